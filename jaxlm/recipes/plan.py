r"""Examples:

  jaxlm plan --config configs/pretrain/llama_8b_pod.py --topology v5p:4x4x8
  jaxlm plan --config configs/pretrain/llama_8b_pod.py --topology v6e:16x16 --config.mesh.fsdp=256 --json plan.json
  jaxlm plan --config configs/pretrain/llama_8b_pod.py --topology v5e:16x16 --slices 2 --config.mesh.slice=2 ...
  jaxlm plan --config configs/pretrain/llama_8b_pod.py --topology h100:16x8
  jaxlm plan --config configs/quickstart.py --topology cpu:8
  jaxlm plan --config configs/pretrain/llama_8b_pod.py --topology v5p:4x4x8 --search 3 --quick
  jaxlm plan --config configs/pretrain/llama_8b_pod.py --scale v5p:2x2x4 v5p:4x4x4 v5p:4x8x8 v5p:8x8x16 --plot weak.png

Compiles the training step of a config for devices that are not here, and says whether it fits and what bounds it:
memory per device by class, collectives by kind and mesh axis, and the least time that products, memory and network
need. Nothing is read but the config: no data, no weights. TPUs need libtpu: pip install 'jaxlm[tpu]'; GPUs Python 3.12
and their compiler: pip install 'jaxlm[cuda]'.

  jaxlm plan --config configs/pretrain/llama_8b_pod.py --topology v5e:2x4 --config.mesh.fsdp=1 --config.mesh.tensor=8 \
    --generate 64 1024 512                                              prefill and decoding with that model
  jaxlm plan --config configs/sentence_by_sentence/gpt2.py --topology v5e:2x4 --stage contextual --config.mesh.data=8

Topologies: chips in each direction (v4:4x4x4, v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:2x2x4), nodes and GPUs of each
(a100:, h100:, h200:, b200:4x8), simulated devices (cpu:8). The mesh of the config must have as many devices.
Recipes: lm, dpo, simcse, sentence_by_sentence (--stage: the first latent). Times are bounds, from the peaks of the chip
(jaxlm/train/chips.py): each is what the step would take if nothing else took any, so their largest bounds the MFU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.ops.platform import compiling_for, use_kernels
from jaxlm.recipes.plan_table import Plan, as_dict, plot, render
from jaxlm.recipes.plan_work import make_work
from jaxlm.recipes.train import NO_KERNELS, load_recipe
from jaxlm.recipes.wiring import make_step
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.rules import batch_parts
from jaxlm.sharding.topology import devices_of
from jaxlm.train.chips import Chip, chip
from jaxlm.train.collectives import Collective, collectives
from jaxlm.train.loop import lower_ahead
from jaxlm.train.memory import total_bytes

COMPILES = 3
"""In search of the largest batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm plan`."""
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a Python file with get_config()")
    parser.add_argument("--topology", metavar="NAME:AxBxC", help="v5p:4x4x8, h100:16x8, cpu:8")
    parser.add_argument("--slices", type=int, default=1, help="that many TPU slices (default 1)")
    parser.add_argument("--stage", metavar="NAME", help="of sentence_by_sentence (default: the first latent)")
    parser.add_argument("--scale", nargs="+", metavar="NAME:AxBxC", help="on each of these, as many rows per device")
    parser.add_argument("--search", type=int, metavar="N", help="compile the N best layouts and rank them")
    parser.add_argument(
        "--generate", nargs=3, type=int, metavar=("ROWS", "PROMPT", "NEW"),
        help="plan generation instead: so many rows at once, of prompts and new tokens of at most so many",
    )  # fmt: skip
    more = f"do not look for the largest batch, by up to {COMPILES} more compiles"
    parser.add_argument("--no-batch", action="store_true", help=more)
    less = "let the compiler take the least pains: half the time for TPUs; memory may be a fifth less or more, and "
    less += "collectives are those without train.sparse_core"
    parser.add_argument("--quick", action="store_true", help=less)
    parser.add_argument("--no-kernels", action="store_true", help=NO_KERNELS)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the plan there")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="also draw memory and times")


def main(args: argparse.Namespace) -> int:
    """Compiles, and prints the plan."""
    recipe, cfg = load_recipe(args.config, args.overrides)
    cfg = recipe.resolve(cfg)
    if (args.topology is None) == (args.scale is None):
        raise ValueError("give either --topology, or --scale with several of them")
    use_kernels(not args.no_kernels)
    if args.quick:
        jax.config.update("jax_optimization_level", "O0")
        jax.config.update("jax_memory_fitting_level", "O0")
    if args.scale:
        return _scale(cfg, args)
    found = devices_of(args.topology, slices=args.slices)
    print(f"{args.topology}: {len(found)} devices, {found[0].device_kind}; compiling ...", flush=True)
    if args.generate is not None:
        return _generate(cfg, found, args)
    if args.search is not None:
        return _search(cfg, found, args.search)
    plan = make_plan(cfg, found, args.stage)
    print(render(plan))
    if could_scatter(cfg, plan, found[0]):
        print(SPARSE_CORE.format("train." if hasattr(cfg, "train") else ""))
    most = None if args.no_batch else largest_batch(cfg, found, plan, args.stage)
    if most is not None:
        print(f"largest batch that fits, with {num_microbatches(cfg)} micro-batches: {most:,} rows")
    if args.json:
        about = {"arguments": again(args), "largest_batch": most}
        args.json.write_text(json.dumps(as_dict(plan) | about, indent=1) + "\n")
    if args.plot:
        plot(plan, args.plot, title=f"{Path(args.config).stem} on {args.topology}")
    return 0


SPARSE_CORE = (
    "most bytes over fsdp are sums: with --config.{}sparse_core=True gathers and scatters stay what they are, half the "
    "bytes, on the SparseCores"
)


def could_scatter(cfg: Any, plan: Plan, device: Any) -> bool:
    """Whether the compiler makes sums over fsdp of what SparseCores, which the config leaves out, would scatter."""
    found = chip(device)
    if found is None or not found.sparse_cores or getattr(getattr(cfg, "train", cfg), "sparse_core", True):
        return False
    over = {kind: sent for (kind, axes), (_, sent) in plan.sent.items() if axes == ("fsdp",)}
    return over.get("all-reduce", 0.0) > sum(over.values()) / 2


def again(args: argparse.Namespace) -> list[str]:
    """The arguments that give the same plan."""
    given = ["--config", args.config, "--topology", args.topology]
    given += ["--slices", str(args.slices)] if args.slices != 1 else []
    given += ["--stage", args.stage] if args.stage else []
    given += ["--quick"] if args.quick else []
    given += ["--no-kernels"] if args.no_kernels else []
    given += ["--generate", *map(str, args.generate)] if args.generate else []
    return [*given, *(f"--config.{change}" for change in args.overrides)]


def _scale(cfg: Any, args: argparse.Namespace) -> int:
    """Says each size as it is compiled, and then all of them."""
    from jaxlm.recipes import plan_scaling  # which builds on this module

    points = []
    for point in plan_scaling.scale(cfg, args.scale, args.stage):
        points.append(point)
        print(f"{point.topology}: compiled in {point.plan.compile_s:.0f} s", flush=True)
    print("\n" + plan_scaling.render(points))
    if args.json:
        args.json.write_text(json.dumps(plan_scaling.as_dicts(points), indent=1))
    if args.plot:
        plan_scaling.plot(points, args.plot, title=Path(args.config).stem)
    return 0


def _generate(cfg: Any, found: Sequence[Any], args: argparse.Namespace) -> int:
    """Says what prefill and decoding take."""
    from jaxlm.recipes import plan_generate  # which builds on this module

    if args.search is not None or args.stage is not None:
        raise ValueError("--generate plans generation: leave out --search and --stage, which are of training")
    plans = plan_generate.make_plans(cfg, found, plan_generate.Load(*args.generate))
    for name, plan in plans.items():
        print(f"\n{name}: {render(plan)}")
    if args.json:
        found_by_name: dict[str, Any] = {name: as_dict(plan) for name, plan in plans.items()}
        args.json.write_text(json.dumps(found_by_name | {"arguments": again(args)}, indent=1) + "\n")
    if args.plot:
        plot(plans["decode"], args.plot, title=f"{Path(args.config).stem} on {args.topology}: one token in every row")
    return 0


def _search(cfg: Any, found: Sequence[Any], compiles: int) -> int:
    """Says each layout as it is compiled, and then all of them with the lines of the best."""
    from jaxlm.recipes import plan_search  # which builds on this module

    done = []
    for result in plan_search.search(cfg, found, compiles=compiles):
        done.append(result)
        print(f"{len(done)} of {compiles + 1} compiled", flush=True)
    print("\n" + plan_search.render(done))
    return 0


def make_plan(cfg: Any, found: Sequence[Any], stage: str | None = None) -> Plan:
    """The plan of a resolved config on those devices, which need not be here."""
    start = time.perf_counter()
    with compiling_for(found[0].platform, found):
        work, mesh = make_work(cfg, found, stage)
        step = make_step(work.run, work.spec, work.loss, mesh=mesh, row_keys=work.row_keys)
        state = step.abstract.replace(frozen=work.frozen)  # type: ignore[attr-defined]
        lowered = lower_ahead(step.run, state, work.batch, sparse_core=work.run.train.sparse_core)
        compiled = compile_lowered(lowered, TRAINING_ADVICE)
    memory = {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "average": held(state.ema),
        "frozen": held(state.frozen),
        "batch": held(work.batch),
    }
    found = read_plan(compiled, memory, mesh, model_flops=work.model_flops, tokens=work.tokens)
    return found._replace(compile_s=time.perf_counter() - start, assumed=work.assumed)


class DoesNotFitError(ValueError):
    """The compiler finds that a program cannot fit."""


TRAINING_ADVICE = "more devices, a smaller data.batch_size, more train.num_microbatches, or model.remat='full'"


def compile_lowered(lowered: Any, advice: str) -> Any:
    """Compiled; DoesNotFitError where the compiler itself finds that the program cannot fit."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise DoesNotFitError(
            f"it DOES NOT FIT, and the compiler refuses it: {reason}. Take {advice}"
        ) from error


def read_plan(
    compiled: Any,
    memory: Mapping[str, float],
    mesh: Mesh,
    *,
    model_flops: float,
    tokens: int,
    in_place: bool = False,
) -> Plan:
    """What a compiled program says of itself.

    memory: of a device, by class, what is there before it runs. in_place: its results are next to nothing, written into
    the arguments.
    """
    stats = compiled.memory_analysis()
    temporaries = float(stats.temp_size_in_bytes)
    memory = {**memory, "temporaries": temporaries, "program": float(stats.generated_code_size_in_bytes)}
    found = collectives(compiled.as_text(), mesh)
    moved = stats.argument_size_in_bytes + 2 * temporaries + (0 if in_place else stats.output_size_in_bytes)
    peak = peaks(mesh)
    return Plan(
        dict(sorted(memory.items(), key=lambda item: -item[1])),
        total_bytes() / mesh.size if peak is None else peak.memory,
        model_flops,
        {} if peak is None else least_times(model_flops / mesh.size, moved, found, mesh, peak),
        by_kind(found), tokens, compile_s=0.0,
    )  # fmt: skip


def least_times(
    flops: float, moved: float, found: Sequence[Collective], mesh: Mesh, peak: Chip
) -> dict[str, float]:
    """Seconds of a device at its peaks; between: on the network between slices or, of GPUs, nodes."""
    shares = {c.axes: wire_shares(mesh, c.axes) for c in found}
    inside, outside = (sum(c.times * c.sent * shares[c.axes][i] for c in found) for i in (0, 1))
    times = {"products": flops / peak.flops, "memory": moved / peak.memory_bandwidth}
    times["network"] = inside / peak.network_bandwidth
    return times | ({"between": outside / peak.outside_bandwidth} if outside else {})


def wire_shares(mesh: Mesh, axes: Sequence[str]) -> tuple[float, float]:
    """Of what a device sends in a collective over those axes, the share on the wires of its slice or node, and that on
    the network between them.

    A ring sends n - 1 of n parts. Where the n devices lie in p places, a place takes in (p - 1) / p of the whole over
    the network of its n / p devices: p - 1 parts for each.
    """
    place = np.vectorize(_place)(mesh.devices)
    group = place[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].reshape(-1)
    n, p = group.size, len(set(group.tolist()))
    return (0.0 if n == p > 1 else 1.0), (p - 1) / max(n - 1, 1)


def _place(device: Any) -> int:
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else device.process_index


def peaks(mesh: Mesh) -> Chip | None:
    """Those of one device of the mesh: a chip's, or its share where a chip has several devices; None of a CPU."""
    found = list(mesh.devices.flat)
    if found[0].platform == "cpu":
        return None
    whole = chip(found[0])
    if whole is None:
        raise ValueError(f"no peaks are known of {found[0].device_kind!r}: add it to jaxlm/train/chips.py")
    chips = {(getattr(d, "slice_index", 0), *getattr(d, "coords", (d.id,))) for d in found}
    share = len(chips) / len(found)
    return Chip(*(share * x for x in whole))


def held(tree: Any) -> float:
    """Bytes of one device's shards."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    )


def by_kind(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """Runs and bytes sent, by kind and axes, the most bytes first; what joins no axis is left out."""
    sums: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    for c in found:
        if c.axes:
            runs, sent = sums.get((c.kind, c.axes), (0, 0.0))
            sums[c.kind, c.axes] = runs + c.times, sent + c.times * c.sent
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def num_microbatches(cfg: Any) -> int:
    """Of a recipe that has them."""
    return cfg.train.num_microbatches if hasattr(cfg, "train") else 1


def largest_batch(cfg: Any, found: Sequence[Any], plan: Plan, stage: str | None = None) -> int | None:
    """The most rows of a batch that were seen to fit, by up to `COMPILES` more compiles; None if none did."""
    parts = batch_parts(make_mesh(cfg.mesh, found)) * num_microbatches(cfg)
    rows = cfg.data.batch_size // parts
    sizes, guess = {rows: plan.total}, 2 * rows if plan.total <= plan.capacity else rows // 2
    for _ in range(COMPILES):
        if guess < 1 or guess in sizes:
            break
        data = dataclasses.replace(cfg.data, batch_size=guess * parts)
        try:
            sizes[guess] = make_plan(dataclasses.replace(cfg, data=data), found, stage).total
        except DoesNotFitError:
            sizes[guess] = math.inf
        guess = next_guess(sizes, plan.capacity)
    return max((n * parts for n, size in sizes.items() if size <= plan.capacity), default=None)


def next_guess(sizes: Mapping[int, float], capacity: float) -> int:
    """The rows at which a line through two known sizes meets the capacity; between one that fits and one that does not
    where there are both. A peak is the largest of several moments', each linear in the rows: such a line is never below
    it between its points, so what it finds there fits.

    >>> next_guess({1: 30, 2: 40}, 100), next_guess({2: 40, 8: 160}, 100), next_guess({2: 9, 8: math.inf}, 10)
    (8, 5, 5)
    """
    fits = sorted(n for n, size in sizes.items() if size <= capacity)
    beyond = sorted(n for n, size in sizes.items() if size > capacity)
    if fits and beyond:
        low, high = fits[-1], beyond[0]
    else:
        low, high = fits[-2:] if fits else beyond[:2]
    slope = (sizes[high] - sizes[low]) / (high - low)
    if not 0 < slope < math.inf:
        return (low + high) // 2 if beyond else 2 * high
    return low + math.floor((capacity - sizes[low]) / slope)
