"""`jaxlm plan --search`: which mesh, remat policy and number of micro-batches suit a config and its devices best.

All ways that divide are ranked by a model on paper: state and activations against the memory, products (with what remat
computes again) against what the network carries. The best few are then compiled beside the config as it is written, and
what the compiler says decides. The model on paper only has to be good enough to have the best among its few.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.describe import bytes_text
from jaxlm.recipes.plan import DoesNotFitError, held, make_plan, peaks, wire_shares
from jaxlm.recipes.plan_table import Plan
from jaxlm.recipes.plan_work import make_work
from jaxlm.recipes.wiring import make_step
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import check_batch
from jaxlm.sharding.rules import batch_parts
from jaxlm.train.chips import Chip

RECIPES = ("lm", "dpo")
REMAT = {"none": 1.0, "dots": 1.0, "full": 4 / 3}
"""Policies, and by what each multiplies the products: forward again is a third of forward and backward."""
MARGIN = 0.9
"""Of the memory, on paper: what is in doubt is not worth a compilation."""


class Layout(NamedTuple):
    """What the search chooses."""

    mesh: MeshConfig
    remat: str
    num_microbatches: int

    def of(self, cfg: Any) -> Any:
        """The config laid out this way."""
        return dataclasses.replace(
            cfg, mesh=self.mesh, model=dataclasses.replace(cfg.model, remat=self.remat),
            train=dataclasses.replace(cfg.train, num_microbatches=self.num_microbatches),
        )  # fmt: skip


class Guess(NamedTuple):
    """A layout on paper: bytes of a device, of how many there are, and seconds by what is used."""

    layout: Layout
    memory: float
    capacity: float
    times: dict[str, float]


class Found(NamedTuple):
    """A layout compiled. step_s: the least time of a step, with what remat computes again; inf if it does not fit."""

    layout: Layout
    plan: Plan | None
    step_s: float


def search(cfg: Any, found: Sequence[Any], *, compiles: int) -> Iterator[Found]:
    """The config as it is written, then the layouts that are best on paper, each as soon as it is compiled."""
    if cfg.recipe not in RECIPES:
        raise ValueError(f"--search knows the recipes {', '.join(RECIPES)}, found {cfg.recipe!r}: leave it out")
    if peaks(make_mesh(cfg.mesh, found)) is None:
        raise ValueError("--search needs the peaks of the devices, and those of a CPU are not known: name TPUs or GPUs")
    written = written_layout(cfg, len(found))
    guesses = sorted((g for g in guess_all(cfg, found) if g.layout != written), key=rank)
    for layout in [written, *(g.layout for g in guesses[:compiles])]:
        yield try_layout(cfg, layout, found)


def try_layout(cfg: Any, layout: Layout, found: Sequence[Any]) -> Found:
    """Compiled."""
    try:
        plan = make_plan(layout.of(cfg), found)
    except DoesNotFitError:
        return Found(layout, None, float("inf"))
    times = plan.times | {"products": plan.times["products"] * REMAT.get(layout.remat, 1.0)}
    return Found(layout, plan, max(times.values()) if plan.total <= plan.capacity else float("inf"))


def written_layout(cfg: Any, num_devices: int) -> Layout:
    """That of the config, with the size of every axis."""
    mesh = cfg.mesh
    others = mesh.slice * mesh.fsdp * mesh.tensor * mesh.sequence
    return Layout(
        dataclasses.replace(mesh, data=mesh.data or num_devices // others), cfg.model.remat, cfg.train.num_microbatches
    )


def layouts(cfg: Any, num_devices: int) -> Iterator[Layout]:
    """All that divide the devices and the rows; axes that split arrays unevenly are found out later."""
    each = num_devices // cfg.mesh.slice
    for fsdp, tensor, sequence in itertools.product(_divisors(each), repeat=3):
        data, rest = divmod(each, fsdp * tensor * sequence)
        parts = cfg.mesh.slice * max(data, 1) * fsdp
        if rest or not data or cfg.data.batch_size % parts:
            continue
        mesh = MeshConfig(slice=cfg.mesh.slice, data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
        for remat, number in itertools.product(REMAT, _divisors(cfg.data.batch_size // parts)):
            yield Layout(mesh, remat, number)


def guess_all(cfg: Any, found: Sequence[Any]) -> Iterator[Guess]:
    """Every layout that the model, the batch and the wiring of the devices allow, on paper."""
    states: dict[MeshConfig, tuple[Mesh, float, float] | None] = {}
    for layout in layouts(cfg, len(found)):
        if layout.mesh not in states:
            states[layout.mesh] = _state(layout.of(cfg), found)
        if (state := states[layout.mesh]) is not None:
            mesh, size, flops = state
            yield guess(layout.of(cfg), layout, mesh, state=size, flops=flops)


def _state(cfg: Any, found: Sequence[Any]) -> tuple[Mesh, float, float] | None:
    """The mesh, bytes of a device's parameters and what goes with them, and its model FLOPs; None if not allowed."""
    try:
        mesh = make_mesh(cfg.mesh, found)
        check_batch(mesh, batch_size=cfg.data.batch_size, sequence_length=cfg.data.sequence_length)
        work, _ = make_work(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_microbatches=1)), found)
        step = make_step(work.run, work.spec, work.loss, mesh=mesh, row_keys=work.row_keys)
    except (ValueError, NotImplementedError):  # sizes that do not divide; shapes that the wiring cannot take
        return None
    state = step.abstract
    kept = held(state.params) + held(state.opt_state) + held(state.ema) + held(work.frozen)  # type: ignore[attr-defined]
    return mesh, kept, work.model_flops / mesh.size


def guess(cfg: Any, layout: Layout, mesh: Mesh, *, state: float, flops: float) -> Guess:
    """One layout on paper. state: bytes of a device's parameters, optimizer and frozen ones; flops: of a device."""
    model: DecoderConfig = cfg.model
    peak, sizes = peaks(mesh), dict(mesh.shape)
    assert peak is not None  # of chips
    item = jnp.dtype(model.dtype).itemsize
    number, tensor = specs.count(decoder.spec(model)), sizes["tensor"]
    tokens = cfg.data.batch_size * cfg.data.sequence_length / batch_parts(mesh) / sizes["sequence"]
    tokens /= layout.num_microbatches
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    wide = (heads + model.num_heads * model.head_dim + 3 * model.mlp_width) / tensor
    kept = {"full": model.width, "dots": 3 * model.width + wide, "none": 8 * model.width + 2 * wide}
    activations = tokens * item * (kept[layout.remat] * model.num_layers + kept["none"]) + 8 * tokens * model.width
    gradients = 2 * 4 * number / (sizes["fsdp"] * tensor)  # of one micro-batch, and summed
    layer = 2 * item * number / model.num_layers / tensor  # the gathered one, and the next
    memory = state + activations + gradients + layer
    return Guess(layout, memory, peak.memory, _times(cfg, layout, mesh, peak, tokens, flops))


def _times(cfg: Any, layout: Layout, mesh: Mesh, peak: Chip, tokens: float, flops: float) -> dict[str, float]:
    """Seconds of a step. tokens: of a device in one micro-batch."""
    model: DecoderConfig = cfg.model
    item, sizes = jnp.dtype(model.dtype).itemsize, dict(mesh.shape)
    number, passes = specs.count(decoder.spec(model)), 3 if layout.remat == "full" else 2
    whole, rows = number / sizes["tensor"], item * tokens * model.width
    keys = 2 * item * tokens * model.num_kv_heads * model.head_dim * sizes["sequence"]
    runs = layout.num_microbatches * model.num_layers
    joined = {  # by axes: bytes of the arrays gathered and scattered, those summed twice, in a step
        ("fsdp",): layout.num_microbatches * (2 * item + 4) * whole,
        ("tensor",): runs * 2 * passes * 2 * rows,  # two sums a layer and pass
        ("sequence",): runs * passes * keys,
        ("slice", "data", "sequence"): 2 * 4 * whole / sizes["fsdp"],
    }
    inside = outside = 0.0
    for axes, size in joined.items():
        sent = size * (1 - 1 / math.prod(sizes[axis] for axis in axes))
        on_wires, between_places = wire_shares(mesh, axes)
        inside, outside = inside + sent * on_wires, outside + sent * between_places
    products = flops * REMAT[layout.remat] / peak.flops
    weights = layout.num_microbatches * (passes + 1) * item * whole / peak.memory_bandwidth
    network, between = inside / peak.network_bandwidth, outside / peak.outside_bandwidth
    return {"products": products, "memory": weights, "network": network, "between": between}


def rank(guess: Guess) -> tuple[bool, float]:
    """What fits comes first, then the least time; of nearly equal ones, that which leaves more of all else unused."""
    slowest, others = max(guess.times.values()), sum(guess.times.values())
    return guess.memory > MARGIN * guess.capacity, slowest + 0.05 * others


def render(found: Sequence[Found]) -> str:
    """A table, the best first, and the lines of the best for its config."""
    lines = [f"{'mesh':40}{'remat':8}{'micro-batches':>14}{'memory':>12}{'products':>12}{'network':>12}{'step':>12}"]
    best = min(found, key=lambda x: x.step_s)
    for x in sorted(found, key=lambda x: x.step_s):
        mesh = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(x.layout.mesh).items() if v != 1) or "one device"
        line = f"{mesh:40}{x.layout.remat:8}{x.layout.num_microbatches:14}"
        if x.plan is None:
            lines.append(line + f"{'does not fit':>24}")
            continue
        times = x.plan.times
        network = max(times["network"], times.get("between", 0.0))
        step = f"{1e3 * x.step_s:9.0f} ms" if x.step_s < float("inf") else "too large"
        line += f"{bytes_text(int(x.plan.total)):>12}{1e3 * times['products']:9.0f} ms{1e3 * network:9.0f} ms{step:>12}"
        lines.append(line + ("  as written" if x is found[0] else ""))
    sizes = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(best.layout.mesh).items() if v != 1)
    lines += ["", "the config as it is written is best:" if best is found[0] else "the best, to paste into the config:"]
    lines += [f"    config.mesh = dict({sizes})", f'    config.model["remat"] = "{best.layout.remat}"']
    return "\n".join([*lines, f"    config.train.num_microbatches = {best.layout.num_microbatches}"])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
