"""From the metrics of steps still under way to lines: means over an interval, speeds, and the watch for bad steps."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxlm.train.memory import device_peak_bytes, rss_bytes
from jaxlm.train.metrics import Mean
from jaxlm.typing import Metrics

MAX_IN_FLIGHT = 2
"""Steps that may be queued on the devices: enough to keep them busy, and few enough that a run which is asked to stop
does so soon, and that waiting batches take little memory."""


_PAUSES = ("compile_s", "eval_s", "checkpoint_s")


class Throughput(NamedTuple):
    """What speeds are counted by: tokens of a global batch (padding included), model FLOPs per token, and the peak
    FLOP/s of all devices together. None: MFU is not reported."""

    tokens_per_step: int
    flops_per_token: float | None = None
    peak_flops: float | None = None


class Progress:
    """Takes each step's device metrics as soon as it is dispatched, and writes a line every `log_every` steps.

    A step's numbers are fetched when `MAX_IN_FLIGHT` later ones are queued, so the devices never wait for the host.
    log_every, num_steps: lines are written at multiples of the one and at the other; write(step, values): takes a line;
    advance(step): told of every finished step; on_skipped(steps): told of the unbroken series of steps, this one
    included, whose update was skipped; constants: values that stand in every line; saved: what `state()` gave when the
    run was saved.
    """

    def __init__(
        self,
        *,
        log_every: int,
        num_steps: int,
        write: Callable[[int, dict[str, float]], None],
        advance: Callable[[int], None],
        on_skipped: Callable[[list[int]], None],
        throughput: Throughput | None = None,
        constants: Mapping[str, float] | None = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self._constants = dict(constants or {})
        self._log_every, self._num_steps = log_every, num_steps
        self._write, self._advance, self._on_skipped = write, advance, on_skipped
        self._throughput = throughput
        saved = saved or {"mean": {}, "num_skipped": 0, "skipped_in_a_row": []}
        self._mean = Mean(saved["mean"])
        self._num_skipped: int = saved["num_skipped"]
        self._skipped_in_a_row: list[int] = list(saved["skipped_in_a_row"])
        self._in_flight: deque[tuple[int, Metrics]] = deque()
        self._spent: dict[str, float] = {}
        self._paused, self._num_timed = 0.0, 0
        # Runs from the first finished step on: what comes before, and that step itself, is slower than the rest.
        self._clock: float | None = None

    def push(self, step: int, metrics: Metrics) -> None:
        """Hands over the metrics, on their devices, of the update that leads to `step`."""
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        self._in_flight.append((step, metrics))
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._settle()

    def drain(self) -> None:
        """Waits for every step that was pushed, and writes what is due."""
        while self._in_flight:
            self._settle()

    def state(self) -> dict[str, Any]:
        """What lines after a resume depend on, as JSON values; call after `drain`."""
        return {
            "mean": self._mean.state(),
            "num_skipped": self._num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `perf/<name>` of the next line."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._spent[name] = self._spent.get(name, 0.0) + seconds
            self._paused += seconds if name in _PAUSES else 0.0

    def _settle(self) -> None:
        step, metrics = self._in_flight.popleft()
        host = jax.device_get(metrics)
        self._watch(step, bool(host.pop("skipped", (0.0, 1.0))[0]))
        self._mean.add(host)
        self._tick()
        self._advance(step)
        if step % self._log_every == 0 or step == self._num_steps:
            values = {f"train/{name}": value for name, value in self._mean.values().items()}
            self._write(step, {**values, "train/num_skipped": self._num_skipped, **self._constants, **self._perf()})
            self._mean = Mean()
            self._spent = {}
            self._restart_clock()

    def _watch(self, step: int, skipped: bool) -> None:
        if not skipped:
            self._skipped_in_a_row = []
            return
        self._num_skipped += 1
        self._skipped_in_a_row.append(step)
        self._on_skipped(self._skipped_in_a_row)

    def _tick(self) -> None:
        if self._clock is None:
            self._restart_clock()
        else:
            self._num_timed += 1

    def _restart_clock(self) -> None:
        self._clock, self._paused, self._num_timed = time.perf_counter(), 0.0, 0

    def _perf(self) -> dict[str, float]:
        values = {**self._speeds(), **self._spent, "rss_bytes": float(rss_bytes())}
        peak = device_peak_bytes()
        if peak is not None:
            values["device_peak_bytes"] = float(peak)
        return {f"perf/{name}": value for name, value in values.items()}

    def _speeds(self) -> dict[str, float]:
        if self._clock is None or self._num_timed == 0:
            return {}
        steps_per_s = self._num_timed / max(time.perf_counter() - self._clock - self._paused, 1e-9)
        given = self._throughput
        if given is None:
            return {"steps_per_s": steps_per_s}
        tokens_per_s = given.tokens_per_step * steps_per_s
        speeds = {"steps_per_s": steps_per_s, "tokens_per_s": tokens_per_s}
        if given.flops_per_token is not None and given.peak_flops is not None:
            speeds["mfu"] = tokens_per_s * given.flops_per_token / given.peak_flops
        return speeds
