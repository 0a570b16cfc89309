"""Evaluation over whole held-out sets: sums of (total, weight) over every batch, one division at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxlm.train import debug
from jaxlm.train.metrics import Mean
from jaxlm.typing import Batch, Metrics, Params

EvalStep = Callable[[Params, Batch], Metrics]
Evaluate = Callable[[Any, Callable[[], bool]], dict[str, float] | None]
"""(state, stop) -> named values; None if `stop()` became true before it was through."""

_MAX_IN_FLIGHT = 2


def make_evaluate(
    eval_step: EvalStep,
    sets: Mapping[str, Callable[[], Iterable[Any]]],
    *,
    place: Callable[[Any], Batch],
    params_of: Callable[[Any], Params] = lambda state: state.params,
    jit: bool = True,
) -> Evaluate:
    """Returns `evaluate(state, stop)`, which gives `<set>/<metric>` = sum of totals / sum of weights over all batches.

    eval_step: (params, batch) -> {name: (total, weight)} of device scalars; it is jitted here, once, unless jit is
    False (it is made of compiled functions then). sets: name -> function giving the set's host batches from the
    beginning; place: a host batch to devices; params_of: what of the state is evaluated (its moving average, say).
    """
    if not jit:
        compiled: Callable[..., Metrics] = eval_step
    else:
        compiled = debug.watch(eval_step, "the evaluation step") if debug.enabled() else jax.jit(eval_step)

    def evaluate(state: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        values: dict[str, float] = {}
        for name, batches in sets.items():
            mean = Mean()
            running: deque[Metrics] = deque()
            for batch in batches():
                if stop():
                    return None
                running.append(compiled(params_of(state), place(batch)))
                if len(running) > _MAX_IN_FLIGHT:
                    mean.add(jax.device_get(running.popleft()))
            for metrics in running:
                mean.add(jax.device_get(metrics))
            values |= {f"{name}/{metric}": value for metric, value in mean.values().items()}
            if not mean.state():
                raise ValueError(f"evaluation set {name!r}: expected at least one batch, found none")
        return values

    return evaluate
