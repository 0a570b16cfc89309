"""What `jaxlm train --debug` watches; on wherever `jax_debug_nans` is (so JAX_DEBUG_NANS=1 turns it on as well).

At every call of a watched function: no array travels to or from the device unasked, nothing is compiled after the
first call, and what comes out is as finite, and has the shapes and dtypes, that it must have. The first update that
the step would have skipped is run again one operation at a time, so that the error points at the line that made it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import chex
import jax
from jax import monitoring

from jaxlm.typing import Batch, Metrics

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def enabled() -> bool:
    """Whether functions are to be watched."""
    return bool(jax.config.jax_debug_nans)  # type: ignore[attr-defined]


def compile_watched(train_step: Callable[..., Any], state: Any, batch: Batch) -> Callable[..., Any]:
    """In place of `compile_ahead`: the step watched, and traced when it skips an update. The state is not donated,
    since tracing needs it: twice the memory."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    run = watch(train_step, "the training step", out_shardings=(shardings, None))

    def step(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        new, metrics = run(state, batch)
        if "skipped" in metrics and float(metrics["skipped"][0]):
            trace(train_step, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        chex.assert_tree_all_finite((new.params, metrics))
        return new, metrics

    return step


def watch(fn: Callable[..., Any], name: str, **options: Any) -> Callable[..., Any]:
    """`jax.jit(fn, **options)` that refuses implicit transfers, and to be compiled twice (RuntimeError).

    Where jit is disabled there is neither, and this is fn.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return fn
    compiled, first = jax.jit(fn, **options), dict[str, str]()

    @wraps(fn)
    def call(*args: Any) -> Any:
        before = _compilations()[0]
        with jax.transfer_guard("disallow"):
            result = compiled(*args)
        described = _describe(args)
        if not first:
            first.update(described)
        elif _compilations()[0] > before:
            raise RuntimeError(f"{name} was compiled again: {_changes(first, described)}")
        return result

    return call


def trace(fn: Callable[..., Any], *args: Any) -> None:
    """Runs fn one operation at a time; raises FloatingPointError from the first that makes a NaN, or at the end."""
    with jax.disable_jit(), jax.debug_nans(True):
        fn(*args)
    raise FloatingPointError(
        "the update was skipped, yet no operation made a NaN: the loss or the gradient is infinite, or no target has "
        "weight. Run the step with --no-jit and look at the batch"
    )


def _describe(args: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(args)
    return {jax.tree_util.keystr(path): f"{jax.typeof(x)} on {getattr(x, 'sharding', 'host')}" for path, x in leaves}


def _changes(first: dict[str, str], now: dict[str, str]) -> str:
    changed = [
        f"{path} was {first.get(path, 'absent')}, is {now.get(path, 'absent')}"
        for path in sorted(first.keys() | now.keys())
        if first.get(path) != now.get(path)
    ]
    return "; ".join(changed) or "its arguments look the same (JAX_EXPLAIN_CACHE_MISSES=1 tells more)"


@cache
def _compilations() -> list[int]:
    """[how often XLA was asked for a program since this was first called]."""
    count = [0]

    def listen(event: str, duration: float, **_: Any) -> None:
        count[0] += event == _COMPILE_EVENT

    monitoring.register_event_duration_secs_listener(listen)
    return count
