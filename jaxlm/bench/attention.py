"""Causal attention: every implementation against jax.nn.dot_product_attention, in time, work rate, memory and error.

    jaxlm bench attention                                   # 4 rows of 1024, 8 heads of 64, float32
    jaxlm bench attention --rows 1 --length 8192 --heads 32 --kv-heads 8 --head-dim 128 --dtype bfloat16
    jaxlm bench attention --documents 4 --json out.json --plot out.png            # packed rows

The candidates take turns in one process; compare the column "speed-up". TFLOP/s count what a causal row needs, half of
the square: 2 B N T^2 H forward, 7 B N T^2 H with gradients (whatever a candidate computes in fact; of packed rows and
windows too). "of peak" is their share of the rate of square products of the same dtype. "cudnn" runs on NVIDIA GPUs,
for bfloat16 and rows of one document, "splash" on TPUs. Errors are against the reference in float64, of the first row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.bench.measurement import Measurement, compare, plot, table
from jaxlm.ops.attention import attention, kernel_of, obstacles
from jaxlm.ops.masks import attention_mask
from jaxlm.typing import Array, Float, Int

BASELINE = "dot_product_attention"
Run = Callable[[Array, Array, Array], Array]


class Problem(NamedTuple):
    """Random queries, keys and values of rows in order. segments: documents of a row (None: one)."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    segments: Int[Array, "B T"] | None
    window: int | None


def make_problem(args: argparse.Namespace) -> Problem:
    """By the arguments; documents are of equal lengths."""
    heads = (args.heads, args.kv_heads or args.heads, args.kv_heads or args.heads)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (args.rows, args.length, n, args.head_dim), jnp.dtype(args.dtype))
        for key, n in zip(keys, heads)
    )
    if args.length % args.documents:
        raise ValueError(f"--documents: expected a divisor of --length {args.length}, found {args.documents}")
    one = jnp.repeat(jnp.arange(1, args.documents + 1, dtype=jnp.int32), args.length // args.documents)
    segments = None if args.documents == 1 else jnp.broadcast_to(one, q.shape[:2])
    return Problem(q, k, v, segments, args.window)


def candidates(problem: Problem) -> dict[str, Run]:
    """Those that run here, the rival first."""
    where = _where(problem)

    def rival(q: Array, k: Array, v: Array) -> Array:
        mask = attention_mask(*where.values(), window=problem.window)
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=q.shape[-1] ** -0.5)

    def ours(name: Any, q: Array, k: Array, v: Array) -> Array:
        options: dict[str, Any] = dict(scale=q.shape[-1] ** -0.5, window=problem.window, in_order=True)
        return attention(q, k, v, implementation=name, **options, **where)

    packed = problem.segments is not None
    kernel = kernel_of(jax.default_backend())
    hindrances = obstacles(problem.q, problem.k, in_order=True, packed=packed, soft_cap=None)
    fused = () if kernel is None or hindrances[kernel] else (kernel,)
    return {BASELINE: rival} | {name: partial(ours, name) for name in ("reference", "blockwise", *fused)}


def _where(problem: Problem) -> dict[str, Any]:
    positions = jnp.broadcast_to(jnp.arange(problem.q.shape[1]), problem.q.shape[:2])
    segments = problem.segments
    return dict(q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments)


def exact(problem: Problem) -> np.ndarray:
    """The first row in numpy float64, [T, N, H]."""
    q, k, v = (np.asarray(x[0], np.float64) for x in problem[:3])
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    mask = np.asarray(attention_mask(*_where(problem).values(), window=problem.window))[0]
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        z = np.where(mask, q[:, head] @ k[:, head].T * q.shape[-1] ** -0.5, -np.inf)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        out[:, head] = p / p.sum(axis=1, keepdims=True) @ v[:, head]
    return out


def with_gradients(run: Run) -> Callable[..., Any]:
    """The output, and the gradients of its sum with weights."""

    def total(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        out = run(q, k, v)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    def both(q: Array, k: Array, v: Array) -> Any:
        (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    return both


def measure(problem: Problem, direction: str, *, rounds: int, truth: np.ndarray) -> list[Measurement]:
    """All candidates in one direction, "forward" or "forward+backward"."""
    gradients = direction != "forward"
    runs = {name: with_gradients(f) if gradients else f for name, f in candidates(problem).items()}
    compiled = {name: jax.jit(f).lower(*problem[:3]).compile() for name, f in runs.items()}
    batch, length, heads, dim = problem.q.shape
    flop = (7.0 if gradients else 2.0) * batch * heads * length**2 * dim
    return compare(
        direction,
        {name: partial(f, *problem[:3]) for name, f in compiled.items()},
        baseline=BASELINE,
        rounds=rounds,
        dtype=problem.q.dtype,
        flop=dict.fromkeys(compiled, flop),
        temp_bytes={name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()},
        error=lambda name, result: float(np.abs(np.asarray(jax.tree.leaves(result)[0][0], np.float64) - truth).max()),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jaxlm bench attention`."""
    sizes = dict(rows=4, length=1024, heads=8, head_dim=64, documents=1)
    helps = ("of a batch", "of a row", "of queries", "entries of a head", "packed into a row")
    for (name, size), text in zip(sizes.items(), helps):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"{text} (default {size})")
    parser.add_argument("--kv-heads", type=int, help="of keys and values (default: --heads)")
    parser.add_argument("--window", type=int, help="keys that a query sees at most (default: all before it)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all (default float32)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median counts (default 7)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the measurements to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="also draw them, into this .png, .svg or .pdf")


def main(args: argparse.Namespace) -> int:
    """Measures both directions, prints the table, writes JSON and plot."""
    problem = make_problem(args)
    truth = exact(problem)
    lines = [m for d in ("forward", "forward+backward") for m in measure(problem, d, rounds=args.rounds, truth=truth)]
    names = ("rows", "length", "heads", "kv_heads", "head_dim", "documents", "window", "dtype")
    size = {name: getattr(args, name) for name in names}
    device = jax.devices()[0]
    where = {"jax": jax.__version__, "platform": device.platform, "device": device.device_kind} | size
    title = " ".join(f"{key}={value}" for key, value in where.items() if value is not None)
    print(title)
    print(table(lines))
    if args.plot:
        plot(lines, args.plot, title=title)
    if args.json:
        args.json.write_text(json.dumps(where | {"measurements": [m._asdict() for m in lines]}, indent=1))
    return 0
