"""A run's folder and all that is open in it: what the loop calls, line by line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxlm.train.bucket import CHECKPOINTS, Copies, home
from jaxlm.train.checkpoint import Checkpoints, all_steps, load_newest
from jaxlm.train.config import TrainConfig
from jaxlm.train.evaluate import Evaluate
from jaxlm.train.goodput import FILE as TIMELINE
from jaxlm.train.goodput import TimelineSink
from jaxlm.train.heartbeat import Heartbeat
from jaxlm.train.metrics import Console, JsonlSink, Sink
from jaxlm.train.preemption import Preempted, Preemption
from jaxlm.train.profile import Profiler
from jaxlm.train.progress import Progress, Throughput
from jaxlm.train.record import check_resumable, write_record
from jaxlm.train.tensorboard import TensorBoardSink
from jaxlm.train.wandb import WandbSink

Batches = Callable[[int, int], Iterable[tuple[int, Any]]]
"""(start, stop) -> (step, host batch) for every step from start up to stop."""


def due(step: int, every: int | None, num_steps: int) -> bool:
    """Whether what is done every `every` steps, and at the end, is done after `step` updates.

    >>> [step for step in range(8) if due(step, 3, 7)]
    [0, 3, 6, 7]
    """
    return step == num_steps or (every is not None and step % every == 0)


class Run:
    """One run's folder and everything open in it; each method is a line of the loop."""

    def __init__(
        self,
        cfg: TrainConfig,
        run_dir: Path,
        abstract_state: Any,
        *,
        record: dict[str, Any],
        sinks: Sequence[Sink],
        throughput: Throughput | None,
        batch_indices: Callable[[int], Any] | None,
        may_change: Sequence[str],
        constants: Mapping[str, float],
        profile_steps: Sequence[int],
        stack: contextlib.ExitStack,
    ) -> None:
        self._cfg, self._dir, self._record, self._stack = cfg, run_dir, record, stack
        self._batch_indices = batch_indices
        there = home(run_dir, cfg.bucket)
        self._folder = there / CHECKPOINTS
        notes: list[str] = []

        def check(saved: Mapping[str, Any]) -> None:
            notes[:] = self._check_resume(saved["step"], saved["record"]["run"], may_change)

        found = load_newest(self._folder, abstract_state, check=check)
        copies = self._copies(there, resumed=found is not None)
        saved = {} if found is None else found.saved
        self.resumed, self.start = found is not None, 0 if found is None else found.step
        self._restored = None if found is None else found.state
        self._evaluated: bool = saved.get("record", {}).get("evaluated", False)
        self.latest: dict[str, float] = saved.get("metrics", {})

        self._console = Console(cfg.num_steps, start=self.start) if jax.process_index() == 0 else None
        self._sinks = self._open_sinks(sinks)
        self._checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(
                    self._folder, keep_last=cfg.keep_last, best_metric=cfg.best_metric, best_mode=cfg.best_mode,
                    beside=None if copies is None else copies.update,
                )  # fmt: skip
            )
        )
        self.preemption = stack.enter_context(Preemption())
        self._heartbeat = Heartbeat(run_dir, process=jax.process_index(), stall_s=cfg.stall_s, end=cfg.stall_ends)
        stack.callback(self._heartbeat.close)
        self.progress = Progress(
            log_every=cfg.log_every,
            num_steps=cfg.num_steps,
            write=self._write,
            advance=self._advance,
            on_skipped=self._stop_if_too_many,
            throughput=throughput,
            constants=constants,
            saved=saved.get("record", {}).get("progress"),
        )
        self.profiler = Profiler(profile_steps, run_dir, drain=self.progress.drain)
        stack.callback(self.profiler.close)
        self._announce(notes, [] if found is None else found.set_aside)

    def restored(self) -> Any:
        """Hands over the state of the newest sound checkpoint, once: the steps donate it."""
        state, self._restored = self._restored, None
        return state

    def evaluate(self, step: int, state: Any, evaluate: Evaluate | None) -> dict[str, float] | None:
        """The scores of this step, written; {} where none are due, None where a signal cut the evaluation short."""
        cfg = self._cfg
        done_before = self._already(step) and self._evaluated
        if evaluate is None or done_before or not due(step, cfg.eval_every, cfg.num_steps):
            return {}
        self.progress.drain()
        with self.progress.timed("eval_s"):
            scores = evaluate(state, self.preemption.asked)
        if scores is not None:
            if cfg.best_metric is not None and cfg.best_metric not in scores:
                raise ValueError(f"best_metric: expected one of {sorted(scores)}, found {cfg.best_metric!r}")
            self._write(step, scores)
        return scores

    def save(self, step: int, state: Any, scores: dict[str, float] | None, *, now: bool) -> None:
        """Starts a checkpoint where one is due or asked for; surfaces the failure of the one before."""
        self._checkpoints.raise_if_failed()
        if self._already(step) or not (now or due(step, self._cfg.checkpoint_every, self._cfg.num_steps)):
            return
        self.progress.drain()
        for sink in self._sinks:
            sink.flush()
        record = {"run": self._record, "evaluated": scores is not None, "progress": self.progress.state()}
        with self.progress.timed("checkpoint_s"):
            self._checkpoints.save(step, state, record=record, metrics=scores)
            if now or step == self._cfg.num_steps:
                self._checkpoints.wait()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Notes and says how long the compilation inside takes."""
        start = time.perf_counter()
        with self.progress.timed("compile_s"):
            yield
        self._say(f"compiled the training step in {time.perf_counter() - start:.1f} s")

    def preempted(self, step: int) -> Preempted:
        """What to raise when a signal has asked the run to stop and it is saved."""
        self._say(f"stopped by a signal: step {step} is saved in {self._folder}; the same command resumes from there")
        return Preempted(step)

    def open(self, batches: Batches) -> Iterator[tuple[int, Any]]:
        """The data from the first step of this start on."""
        data = iter(batches(self.start, self._cfg.num_steps))
        if hasattr(data, "close"):
            self._stack.callback(data.close)
        return data

    def next_batch(self, data: Iterator[tuple[int, Any]], step: int) -> Any:
        """The host batch of this step."""
        with self.progress.timed("data_wait_s"):
            found, batch = next(data, (None, None))
        if found != step:
            raise ValueError(f"the data was asked for the batch of step {step} and gave {found or 'none'}")
        return batch

    def _already(self, step: int) -> bool:
        return self.resumed and step == self.start

    def _check_resume(self, step: int, recorded: Mapping[str, Any], may_change: Sequence[str]) -> list[str]:
        if step > self._cfg.num_steps:
            raise ValueError(
                f"{self._folder} is at step {step}, beyond num_steps={self._cfg.num_steps}: "
                "raise num_steps, or start anew in another run folder"
            )
        return check_resumable(_identity_of(recorded), _identity_of(self._record), may_change=may_change)

    def _copies(self, there: epath.Path, *, resumed: bool) -> Copies | None:
        """Of the run's folder in a bucket, brought back where the run goes on; None where there is nothing to do."""
        if self._cfg.bucket is None:
            return None
        if not resumed and (steps := all_steps(self._dir / CHECKPOINTS)):
            raise ValueError(
                f"{self._dir / CHECKPOINTS} has steps {steps} and {there} has none: copy that folder there, or leave "
                "out train.bucket, or start anew in another run folder"
            )
        if jax.process_index() != 0:
            return None
        copies = Copies(self._dir, there)
        if resumed:
            copies.bring_back()
        return copies

    def _open_sinks(self, more: Sequence[Sink]) -> list[Sink]:
        if self._console is None:
            return []
        keep = self.start if self.resumed else None
        where = {} if self._cfg.bucket is None else {CHECKPOINTS: str(self._folder)}
        write_record(self._dir, self._record | where, step=self.start)
        lines = JsonlSink(self._dir / "metrics.jsonl", keep_through=keep)
        events = TensorBoardSink(self._dir / "tensorboard", keep_through=keep)
        timeline = TimelineSink(self._dir / TIMELINE, step=self.start)
        sinks: list[Sink] = [self._console, lines, events, timeline, *more]
        if self._cfg.wandb_project is not None:
            sinks.append(WandbSink(self._cfg.wandb_project, self._dir, self._record.get("config", {})))
        for sink in sinks:
            self._stack.callback(sink.close)
        return sinks

    def _announce(self, notes: Sequence[str], set_aside: Sequence[str]) -> None:
        for note in set_aside:
            self._say(f"WARNING: {note}; the run goes on from an earlier one")
        if self.resumed and self.start == self._cfg.num_steps:
            self._say(f"already finished: step {self.start} of {self._cfg.num_steps} is in {self._folder}")
        elif self.resumed:
            self._say(f"resuming from step {self.start} of {self._cfg.num_steps} ({self._folder / str(self.start)})")
        for note in notes:
            self._say(f"changed since that checkpoint: {note}")

    def _advance(self, step: int) -> None:
        self._heartbeat.beat(step)
        if self._console is not None:
            self._console.advance(step)

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.message(text)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.latest |= values
        for sink in self._sinks:
            sink.write(step, values)

    def _stop_if_too_many(self, steps: list[int]) -> None:
        """Raises when the updates leading to `steps`, in a row, were all skipped and there are too many of them."""
        if len(steps) < self._cfg.max_skipped_in_a_row:
            return
        path = self._dir / "nonfinite.json"
        report = {"last_good_step": steps[0] - 1, "batches": [self._batch_report(step - 1) for step in steps]}
        if jax.process_index() == 0:
            path.write_text(json.dumps(report, indent=2, default=str) + "\n")
        raise FloatingPointError(
            f"{len(steps)} updates in a row were skipped because a number was not finite (or no target counted), the "
            f"first at step {steps[0] - 1}; parameters are those of step {steps[0] - 1}. The batches are listed in "
            f"{path}. Look at that data, or lower the learning rate or the gradient clip"
        )

    def _batch_report(self, step: int) -> dict[str, Any]:
        return {"step": step, "indices": self._batch_indices(step) if self._batch_indices is not None else None}


def _identity_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same on resuming: the config, and the data it stands for."""
    return {**record.get("config", {}), "data_fingerprint": record.get("data_fingerprint")}
