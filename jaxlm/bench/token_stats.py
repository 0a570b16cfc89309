"""token_stats against log_softmax on materialised logits: time, work rate, temporary memory, error against float64.

    jaxlm bench token_stats                                 # N=1024 D=512 V=65536 float32, forward, then with gradients
    jaxlm bench token_stats --dtype bfloat16 --json out.json
    jaxlm bench token_stats --tokens 8192 --width 4096 --vocab 131072 --dtype bfloat16 --weights bfloat16 --versus torch
    jaxlm bench token_stats --only tiled one_pass --plot out.png
    jaxlm bench token_stats --compile-for v5e:2x2 --tokens 8192 --width 4096 --vocab 131072       (or h200:1x1)

The candidates take turns in one process; compare the column "speed-up", not the times of two runs. TFLOP/s count the
products that a candidate needs: 2NDV forward; with gradients 6NDV dense and one_pass, 8NDV tiled, which computes the
logits twice; "half" has half the positions masked and half of that. "of peak" is their share of the rate of square
products of the same dtype, which take their turn too. Where tokamax is installed, its chunked loss stands beside.
--versus torch (on a GPU) adds PyTorch's linear and cross_entropy and, where installed, Liger's fused kernel and
cut-cross-entropy: these rivals give no entropy; temporary memory of PyTorch's is what its allocator saw, the gradients
included.

--compile-for needs no accelerator: it compiles `tiled` and the kernel for a chip of the named kind, in bfloat16, and
shows the temporary memory (pip install 'jaxlm[tpu]', or 'jaxlm[cuda]' on Python 3.12). What was measured where is in
jaxlm/ops/token_stats/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.bench import ahead, token_stats_torch
from jaxlm.bench.measurement import Measurement, compare, plot, table
from jaxlm.ops.token_stats import one_pass_nll, token_stats
from jaxlm.typing import Array, Float, Int

LogProb = Callable[[Array, Array, Array], Any]
BASELINE = "log_softmax"


class Problem(NamedTuple):
    """Random hidden states and an unembedding whose logits have unit variance."""

    hidden: Float[Array, "N D"]
    unembed: Float[Array, "V D"]
    targets: Int[Array, "N"]


def make_problem(
    *, num_tokens: int, width: int, vocab: int, dtype: str, weights: str = "float32", seed: int = 0
) -> Problem:
    """Inputs of the benchmark; unembed is float32, as master parameters are, unless `weights` says otherwise.

    Its numbers are exact in `dtype`, so that the errors are those of the candidates, not of one rounding they share.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    unembed = jax.random.normal(keys[1], (vocab, width)) * width**-0.5
    return Problem(
        hidden=jax.random.normal(keys[0], (num_tokens, width), jnp.dtype(dtype)),
        unembed=unembed.astype(dtype).astype(weights),
        targets=jax.random.randint(keys[2], (num_tokens,), 0, vocab),
    )


def log_softmax(hidden: Float[Array, "N D"], unembed: Float[Array, "V D"], targets: Int[Array, "N"]) -> Array:
    """What one writes by hand: the logits, their log-softmax, the target's entry."""
    log_probs = jax.nn.log_softmax(_logits(hidden, unembed))
    return jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]


def log_softmax_entropy(hidden: Float[Array, "N D"], unembed: Float[Array, "V D"], targets: Int[Array, "N"]) -> Any:
    """The same, and the entropy."""
    log_probs = jax.nn.log_softmax(_logits(hidden, unembed))
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)
    return jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0], entropy


def optax_loss(hidden: Float[Array, "N D"], unembed: Float[Array, "V D"], targets: Int[Array, "N"]) -> Array:
    """optax on materialised logits."""
    return -optax.softmax_cross_entropy_with_integer_labels(_logits(hidden, unembed), targets)


def _logits(hidden: Array, unembed: Array) -> Array:
    return jnp.matmul(hidden, unembed.astype(hidden.dtype).T, preferred_element_type=jnp.float32)


def tokamax_loss(hidden: Float[Array, "N D"], unembed: Float[Array, "V D"], targets: Int[Array, "N"]) -> Array:
    """tokamax's loss that does not hold the logits; it takes the unembedding in the dtype of the hidden states."""
    import tokamax

    return -tokamax.linear_softmax_cross_entropy_loss(
        hidden, targets, unembed.astype(hidden.dtype).T, reduction="none", implementation="chunked_xla"
    )


def _ours(implementation: str, outputs: tuple, hidden: Array, unembed: Array, targets: Array) -> Any:
    stats = token_stats(hidden, unembed, targets, outputs=outputs, implementation=implementation)
    return stats.logprob if outputs == ("logprob",) else (stats.logprob, stats.entropy)


def _half(hidden: Array, unembed: Array, targets: Array) -> Any:
    mask = jnp.arange(len(targets)) % 2 == 0
    return token_stats(hidden, unembed, targets, mask=mask, outputs=("logprob",)).logprob


def _one_pass(hidden: Array, unembed: Array, targets: Array) -> Any:
    total, stats = one_pass_nll(hidden, unembed, targets, outputs=("logprob",))
    return stats.logprob, total


CANDIDATES: dict[str, LogProb] = {
    BASELINE: log_softmax,
    "log_softmax+entropy": log_softmax_entropy,
    "optax": optax_loss,
    "dense": partial(_ours, "dense", ("logprob",)),
    "tiled": partial(_ours, "tiled", ("logprob",)),
    "tiled+entropy": partial(_ours, "tiled", ("logprob", "entropy")),
    "half": _half,
    "one_pass": _one_pass,
}
INSTALLED: dict[str, LogProb] = {"tokamax": tokamax_loss}
"""Rivals from the packages of these names, where they are installed."""
GPU_CANDIDATES: dict[str, LogProb] = {"mosaic_gpu": partial(_ours, "mosaic_gpu", ("logprob", "entropy"))}
"""With the entropy; bfloat16 only."""
PRODUCTS: dict[str, dict[str, float]] = {
    "forward": {"half": 0.5},
    "forward+backward": {"tiled": 4, "tiled+entropy": 4, "half": 2, "mosaic_gpu": 4, "tokamax": 4},
}
"""Products of N D V each, 2 FLOP an entry, where they are not 1 forward and 3 with gradients."""


def candidates(problem: Problem, only: Sequence[str] = ()) -> dict[str, LogProb]:
    """Those that run here, or of them the baseline and `only`; ValueError for a name that is none of them."""
    found = CANDIDATES | {name: f for name, f in INSTALLED.items() if importlib.util.find_spec(name) is not None}
    if problem.hidden.dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
        found = found | GPU_CANDIDATES
    unknown = [name for name in only if name not in found]
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(found)}; found {', '.join(unknown)}")
    return {name: f for name, f in found.items() if not only or name in (BASELINE, *only)}


def with_gradients(candidate: LogProb) -> LogProb:
    """The value, and the gradients of the summed outputs with respect to hidden and unembed."""

    def total(hidden, unembed, targets):
        out = candidate(hidden, unembed, targets)
        return sum(jnp.sum(x) for x in jax.tree.leaves(out)), out

    def run(hidden, unembed, targets):
        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, unembed, targets)
        return out, grads

    return run


def exact(problem: Problem, *, rows: int) -> Float[np.ndarray, "R"]:
    """Log-probabilities of the first `rows` targets in numpy float64."""
    z = np.asarray(problem.hidden[:rows], np.float64) @ np.asarray(problem.unembed, np.float64).T
    z -= z.max(axis=1, keepdims=True)
    targets = np.asarray(problem.targets[:rows])
    return z[np.arange(len(z)), targets] - np.log(np.exp(z).sum(axis=1))


def measure(
    problem: Problem, direction: str, *, rounds: int, truth: Float[np.ndarray, "R"], only: Sequence[str] = (),
    versus_torch: bool = False,
) -> list[Measurement]:  # fmt: skip
    """All candidates in one direction, "forward" or "forward+backward", in interleaved rounds."""
    gradients = direction != "forward"
    runs = {name: with_gradients(f) if gradients else f for name, f in candidates(problem, only).items()}
    compiled = {name: jax.jit(f).lower(*problem).compile() for name, f in runs.items()}
    calls: dict[str, Callable[[], Any]] = {name: partial(f, *problem) for name, f in compiled.items()}
    temps = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}
    products = {name: PRODUCTS[direction].get(name, 3 if gradients else 1) for name in calls}
    if versus_torch:
        for name, rival in token_stats_torch.rivals(*problem, gradients=gradients).items():
            calls[name], products[name] = rival.call, rival.products[direction]
            temps[name] = token_stats_torch.measured_temp_bytes(rival.call)
    (tokens, width), vocab = problem.hidden.shape, problem.unembed.shape[0]
    return compare(
        direction,
        calls,
        baseline=BASELINE,
        rounds=rounds,
        dtype=problem.hidden.dtype,
        flop={name: 2.0 * products[name] * tokens * width * vocab for name in calls},
        temp_bytes=temps,
        error=lambda name, result: _error(name, result, truth, is_loss=name not in compiled),
    )


def _error(name: str, result: Any, truth: Float[np.ndarray, "R"], *, is_loss: bool) -> float:
    """The largest of the first tokens; NaN where only a sum comes out."""
    first = result.cpu().float().numpy() if is_loss else np.asarray(jax.tree.leaves(result)[0])
    if not first.ndim:
        return float("nan")
    logprob = (-1 if is_loss else 1) * first[: len(truth)].astype(np.float64)
    kept = slice(None, None, 2) if name == "half" else slice(None)
    return float(np.abs(logprob - truth)[kept].max())


def run(
    *, num_tokens: int, width: int, vocab: int, dtype: str, rounds: int, weights: str = "float32", error_rows: int = 64,
    only: Sequence[str] = (), versus_torch: bool = False,
) -> list[Measurement]:  # fmt: skip
    """Both directions on one problem."""
    problem = make_problem(num_tokens=num_tokens, width=width, vocab=vocab, dtype=dtype, weights=weights)
    options: dict[str, Any] = dict(rounds=rounds, only=only, versus_torch=versus_torch)
    candidates(problem, only)
    options["truth"] = exact(problem, rows=min(error_rows, num_tokens))
    return [m for d in ("forward", "forward+backward") for m in measure(problem, d, **options)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jaxlm bench token_stats`."""
    parser.add_argument("--tokens", type=int, default=1024, help="N (default %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="D (default %(default)s)")
    parser.add_argument("--vocab", type=int, default=65536, help="V (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the hidden states")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32", help="of the unembedding")
    parser.add_argument("--versus", choices=["torch", "none"], default="none", help="rivals (default: none)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help=f"these, beside {BASELINE} and rivals")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median counts (default %(default)s)")
    parser.add_argument("--compile-for", metavar="TOPOLOGY", help="compile instead, for v5e:2x2, h200:1x1, …")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the measurements to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="also draw them, into this .png, .svg or .pdf")


def main(args: argparse.Namespace) -> int:
    """Measures or compiles, prints the table, writes the JSON."""
    if args.compile_for:
        return _compile_for(args)
    versus_torch = args.versus == "torch"
    if versus_torch:
        token_stats_torch.check_available()
    size = {
        "num_tokens": args.tokens, "width": args.width, "vocab": args.vocab, "dtype": args.dtype,
        "weights": args.weights,
    }  # fmt: skip
    lines = run(**size, rounds=args.rounds, only=args.only, versus_torch=versus_torch)
    device = jax.devices()[0]
    where = {"jax": jax.__version__, "platform": device.platform, "device": device.device_kind}
    title = " ".join(f"{key}={value}" for key, value in (where | size).items())
    print(title)
    print(table(lines))
    if args.plot:
        plot(lines, args.plot, title=title)
    if args.json:
        args.json.write_text(json.dumps(where | size | {"measurements": [m._asdict() for m in lines]}, indent=1))
    return 0


def _compile_for(args: argparse.Namespace) -> int:
    size = {"num_tokens": args.tokens, "width": args.width, "vocab": args.vocab}
    lines = list(ahead.compile_for(args.compile_for, **size))
    where = {"jax": jax.__version__, "topology": args.compile_for, **size}
    print(" ".join(f"{key}={value}" for key, value in where.items()))
    print(ahead.table(lines))
    if args.json:
        args.json.write_text(json.dumps(where | {"programs": [x._asdict() for x in lines]}, indent=1))
    return 0
