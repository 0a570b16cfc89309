"""The training loop: evaluate, save, next batch, step, log.

A run lives in one folder, and everything in it follows from its config:

    run.json  metrics.jsonl  timeline.jsonl  heartbeat-<process>.json  tensorboard/  checkpoints/<step>/
    and, after too many bad steps, nonfinite.json; where a process hung, stalled-<process>.txt; traces in profile/

`step` counts updates done. What is written for step n (metrics, evaluation, checkpoint) is the state after n updates,
and batch n leads from there to n + 1. A checkpoint holds all that later numbers depend on, so a run that is stopped
anywhere and started again writes the same metrics as one that never was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.train import debug
from jaxlm.train.config import TrainConfig
from jaxlm.train.evaluate import Evaluate
from jaxlm.train.metrics import Sink
from jaxlm.train.progress import Throughput
from jaxlm.train.record import MAY_CHANGE
from jaxlm.train.run import Batches, Run
from jaxlm.train.sparse_core import compiler_options
from jaxlm.typing import Batch, Metrics

__all__ = ["Result", "TrainConfig", "TrainStep", "compile_ahead", "train"]

TrainStep = Callable[[Any, Batch], tuple[Any, Metrics]]


class Result(NamedTuple):
    """What a run ends with: its state, the steps done, and the last values of its metrics."""

    state: Any
    step: int
    metrics: dict[str, float]


def train(
    cfg: TrainConfig,
    *,
    run_dir: str | Path,
    init_state: Callable[[], Any],
    abstract_state: Any,
    train_step: TrainStep,
    batches: Batches,
    place: Callable[[Any], Batch],
    evaluate: Evaluate | None = None,
    record: Mapping[str, Any] | None = None,
    batch_indices: Callable[[int], Any] | None = None,
    throughput: Throughput | None = None,
    sinks: Sequence[Sink] = (),
    may_change: Sequence[str] = MAY_CHANGE,
    constants: Mapping[str, float] | None = None,
    compile_step: Callable[[TrainStep, Any, Batch], TrainStep] | None = None,
    frozen: Any = None,
    profile_steps: Sequence[int] = (),
) -> Result:
    """Trains from the newest checkpoint in `run_dir`, or from `init_state()`, up to `cfg.num_steps`.

    init_state: makes the state of step 0 on its devices; abstract_state: the same as `jax.ShapeDtypeStruct` with
    shardings, which a checkpoint of any mesh is laid out as. train_step: (state, batch) -> (state, metrics), pure; it
    is compiled once, and its first argument is donated. batches: the loader's; place: a host batch to devices.
    evaluate: see `make_evaluate`. record: see `make_record`; kept in every checkpoint, and its config must not change
    on resuming but for `may_change`. batch_indices: step -> what its batch was made of, for the report on steps that
    were not finite. throughput: what tokens/s and MFU are counted by. sinks: further places for metrics. constants:
    values that stand in every line of them. compile_step: (train_step, state, batch) -> what is called at every step;
    None for `compile_ahead`, or, when debugging, `debug.compile_watched`. frozen: parameters that stand in the state
    beside the trained ones and in no checkpoint, since every start of the run makes them anew. profile_steps: those
    that are traced, see `jaxlm.train.profile`.

    Raises Preempted (exit code 75) after SIGTERM or SIGINT, once the state is saved, and FloatingPointError when
    `max_skipped_in_a_row` steps in a row were not finite.
    """
    with contextlib.ExitStack() as stack:
        run = Run(
            cfg,
            Path(run_dir),
            abstract_state,
            record=dict(record or {}),
            sinks=sinks,
            throughput=throughput,
            batch_indices=batch_indices,
            may_change=may_change,
            constants=constants or {},
            profile_steps=profile_steps,
            stack=stack,
        )
        state = run.restored() if run.resumed else init_state()
        if frozen is not None:
            state = state.replace(frozen=frozen)
        step_fn: TrainStep | None = None
        data: Iterator[tuple[int, Any]] | None = None

        for step in range(run.start, cfg.num_steps + 1):
            scores = run.evaluate(step, state, evaluate)
            stop = run.preemption.agreed()
            run.save(step, state if frozen is None else state.replace(frozen=None), scores, now=stop)
            if stop:
                raise run.preempted(step)
            if step == cfg.num_steps:
                break
            data = data or run.open(batches)
            batch = place(run.next_batch(data, step))
            if step_fn is None:
                with run.compiling():
                    ahead = partial(compile_ahead, sparse_core=cfg.sparse_core)
                    compile_ = compile_step or (debug.compile_watched if debug.enabled() else ahead)
                    step_fn = compile_(train_step, state, batch)
            run.profiler.before(step)
            state, metrics = step_fn(state, batch)
            run.progress.push(step + 1, metrics)
        return Result(state, cfg.num_steps, run.latest)


def compile_ahead(train_step: TrainStep, state: Any, batch: Batch, *, sparse_core: bool = False) -> TrainStep:
    """The step compiled for these very shapes and shardings; any other is an error, never a second compilation.

    The state is donated, and comes back with the shardings that it had. Where jit is disabled, the step itself.
    sparse_core: see `jaxlm.train.sparse_core`.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # which the ahead-of-time calls below would not heed
        return train_step
    return lower_ahead(train_step, state, batch, sparse_core=sparse_core).compile()


def lower_ahead(train_step: TrainStep, state: Any, batch: Batch, *, sparse_core: bool = False) -> Any:
    """The step lowered for arrays, or for `jax.ShapeDtypeStruct` with shardings of devices that are not here."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    options = compiler_options(next(iter(jax.tree.leaves(shardings)[0].device_set))) if sparse_core else {}
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    return step.lower(state, batch)
