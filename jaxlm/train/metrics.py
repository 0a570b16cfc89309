"""Metrics: from device sums to named numbers, and where they are written.

One schema everywhere: a step (updates done so far) and `group/name -> number`. Groups: `train` (weighted means since
the last line), `eval` and other evaluation sets, `data` (rows left out, by reason), and `perf` (times, speeds, memory:
all that differs between two runs of one config). A sink is any object with `write`, `flush` and `close`; process 0
alone has sinks.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm


class Sink(Protocol):
    """Where metrics go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of one step."""

    def flush(self) -> None:
        """Makes what was written durable; called before every checkpoint."""

    def close(self) -> None:
        """Releases the file; nothing is written afterwards."""


class Mean:
    """Weighted means of named metrics, from (total, weight) pairs added one step after another.

    Totals are Python floats added in order, so that a mean whose first half was saved and restored (`state`) is equal
    to the last bit.

    >>> mean = Mean()
    >>> mean.add({"loss": (6.0, 2.0)}); mean.add({"loss": (3.0, 1.0)})
    >>> mean.values()
    {'loss': 3.0}
    """

    def __init__(self, state: Mapping[str, tuple[float, float]] | None = None) -> None:
        self._sums = {name: (float(total), float(weight)) for name, (total, weight) in (state or {}).items()}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds one step's host scalars."""
        for name, (total, weight) in metrics.items():
            old_total, old_weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_total + float(total), old_weight + float(weight))

    def values(self) -> dict[str, float]:
        """Total over weight of each metric; NaN where nothing had weight."""
        return {name: total / weight if weight else math.nan for name, (total, weight) in self._sums.items()}

    def state(self) -> dict[str, tuple[float, float]]:
        """The sums so far, as JSON values."""
        return dict(self._sums)


class JsonlSink:
    """One JSON object per line and write: {"step": 10, "train/loss": 5.4, …}; null is a number that is not finite.

    keep_through: None empties the file (a new run); on resume the resumed step: later lines are dropped, so that the
    file becomes that of a run which was never stopped.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_through: int | None = None) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if keep_through is None else [line for line in read_lines(self._path) if line["step"] <= keep_through]
        part = self._path.with_suffix(".part")
        part.write_text("".join(_json_line(line) for line in kept))
        part.replace(self._path)
        self._file = self._path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line."""
        self._file.write(_json_line({"step": step, **values}))

    def flush(self) -> None:
        """Makes the lines so far durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a last line cut off by a kill is left out. No file: no lines."""
    if not Path(path).exists():
        return []
    *whole, _cut_off = Path(path).read_text().split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected one JSON object per line, found {text[:80]!r}") from error
    return lines


def _json_line(values: Mapping[str, Any]) -> str:
    plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return json.dumps(plain) + "\n"


class Console:
    """What a person sees: a progress bar on a terminal, one plain line per write in a log.

    num_steps: length of the run; start: the step it begins from; stream: where to; interactive: whether the stream is
    a terminal (None: asks it).
    """

    def __init__(
        self, num_steps: int, *, start: int = 0, stream: TextIO | None = None, interactive: bool | None = None
    ) -> None:
        self._num_steps, self._start, self._step = num_steps, start, start
        self._stream = stream or sys.stdout
        self._began: float | None = None
        interactive = self._stream.isatty() if interactive is None else interactive
        self._bar = (
            tqdm(total=num_steps, initial=start, unit="step", file=self._stream, dynamic_ncols=True, smoothing=0.1)
            if interactive
            else None
        )

    def message(self, text: str) -> None:
        """Says one line."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def advance(self, step: int) -> None:
        """Tells that `step` updates are done; the time of the first, which compiles, is kept out of the ETA."""
        self._step = step
        if self._began is None:
            self._began, self._start = time.perf_counter(), step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows one step's metrics: in the bar, or as a line; evaluations are a line in both."""
        training = any(name.startswith("train/") for name in values)
        if self._bar is not None and training:
            short = {name: values[name] for name in ("train/loss", "perf/tokens_per_s") if name in values}
            self._bar.set_postfix_str("  ".join(_shown(short)))
            return
        left = [f"eta {self._eta()}"] if training and step < self._num_steps else []
        width = len(str(self._num_steps))
        self.message("  ".join([f"step {step:{width}d}/{self._num_steps}", *_shown(values), *left]))

    def flush(self) -> None:
        """Nothing to do: a line is out when it is printed."""

    def close(self) -> None:
        """Leaves the bar where it stands."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self) -> str:
        done = self._step - self._start
        if self._began is None or done <= 0:
            return "?"
        seconds = (time.perf_counter() - self._began) / done * (self._num_steps - self._step)
        return tqdm.format_interval(seconds)


def _shown(values: Mapping[str, float]) -> list[str]:
    """The entries that a person follows, the loss first; all of them are in the files."""
    first = ("train/loss", "train/bits_per_byte")
    rest = [name for name in values if name not in first and not name.startswith(("perf/", "data/"))]
    perf = ("perf/tokens_per_s", "perf/mfu")
    shown = [name for name in (*first, *rest, *perf) if name in values and name not in _IN_FILES_ONLY]
    return [_format(name, values[name]) for name in shown if values[name] or name != "train/num_skipped"]


_IN_FILES_ONLY = ("train/param_norm", "train/update_norm", "train/tokens")


def _format(name: str, value: float) -> str:
    short = name.removeprefix("train/").removeprefix("perf/")
    if short == "tokens_per_s":
        return f"{value:,.0f} tokens/s"
    if short == "mfu":
        return f"mfu {value:.1%}"
    if short.startswith("num_"):
        return f"{short} {value:.0f}"
    return f"{short} {value:.2e}" if 0 < abs(value) < 1e-2 else f"{short} {value:.3f}"
