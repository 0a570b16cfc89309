"""Where the time of a run went, over all its starts: a file that only ever grows, and what it adds up to.

`metrics.jsonl` is that of a run which was never stopped: what came after the last checkpoint is dropped on resuming.
`timeline.jsonl` drops nothing, so it tells what the stops have cost. One JSON object per line:

    {"event": "start" | "line" | "end", "time": seconds since 1970, "step": 120, "perf": {"compile_s": 3.1, …}}
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "timeline.jsonl"
PAUSES = {"compile_s": "compile", "eval_s": "evaluation", "checkpoint_s": "checkpoints"}
CLASSES = ("steps", "redone", "compile", "data", "evaluation", "checkpoints", "start", "down", "other")
"""Of time. steps: those that count. redone: steps that a stop has thrown away. data: waiting for batches. start: until
the first step of a start, without its compilation. down: between a start's last sign of life and the next start."""


class TimelineSink:
    """A sink of metrics that notes when each line came, and how its time was spent."""

    def __init__(self, path: str | os.PathLike[str], *, step: int) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("a", buffering=1)  # noqa: SIM115 (closed by `close`)
        self._step = step
        if self._file.tell() and not Path(path).read_bytes().endswith(b"\n"):
            self._file.write("\n")  # behind a line that a kill has cut off
        self._note("start", {})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Notes a line."""
        self._step = step
        prefix = "perf/"
        self._note("line", {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)})

    def flush(self) -> None:
        """Nothing to do: a line is out when it is written."""

    def close(self) -> None:
        """Notes the end of this start."""
        self._note("end", {})
        self._file.close()

    def _note(self, event: str, perf: Mapping[str, float]) -> None:
        line = {"event": event, "time": time.time(), "step": self._step, "perf": perf}
        self._file.write(json.dumps(line) + "\n")


def read_timeline(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a run in order; those that kills have cut off are left out. No file: no events."""
    if not Path(path).exists():
        return []
    whole = []
    for text in Path(path).read_text().splitlines():
        try:
            whole.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return whole


def account(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each of `CLASSES`, which add up to the time from the first event to the last; empty without events.

    Goodput is the share of "steps". The time of steps is their number by the speed that their line reports.

    >>> line = dict(event="line", time=20.0, step=10, perf=dict(steps_per_s=1.0, compile_s=6.0))
    >>> found = account([dict(event="start", time=0.0, step=0, perf={}), line])
    >>> {name: seconds for name, seconds in found.items() if seconds}
    {'steps': 10.0, 'compile': 6.0, 'start': 4.0}
    """
    if not events:
        return {}
    spent = dict.fromkeys(CLASSES, 0.0)
    begins = [i for i, event in enumerate(events) if event["event"] == "start"] or [0]
    starts = [events[i:j] for i, j in itertools.pairwise([*begins, len(events)])]
    while len(starts) > 1 and not any(event["perf"] for event in starts[-1]):
        starts.pop()  # of a run that had ended already, or has not begun
    speeds = [e["perf"]["steps_per_s"] for e in events if "steps_per_s" in e["perf"]]
    usual = statistics.median(speeds) if speeds else float("inf")
    for number, start in enumerate(starts):
        after = starts[number + 1][0] if number + 1 < len(starts) else None
        kept = float("inf") if after is None else after["step"]
        _add_start(spent, start, usual=usual, kept=kept)
        spent["down"] += 0.0 if after is None else after["time"] - start[-1]["time"]
    return spent


def _add_start(spent: dict[str, float], start: Sequence[Mapping[str, Any]], *, usual: float, kept: float) -> None:
    """Adds the time of one start. kept: the step from which the next one goes on."""
    last, first = start[0], True
    for event in start[1:]:
        if not event["perf"]:  # an evaluation's line, or the end: in the times of the next line, if there is one
            continue
        length, perf = event["time"] - last["time"], event["perf"]
        pauses = {PAUSES[name]: seconds for name, seconds in perf.items() if name in PAUSES}
        rest = max(length - sum(pauses.values()), 0.0)
        number = event["step"] - last["step"]
        stepping = min(rest, number / perf.get("steps_per_s", usual))
        waiting = min(stepping, perf.get("data_wait_s", 0.0))
        lost = min(max(event["step"] - max(last["step"], kept), 0) / max(number, 1), 1.0)
        for name, seconds in pauses.items():
            spent[name] += min(seconds, length)
        spent["data"] += waiting
        spent["redone"] += lost * (stepping - waiting)
        spent["steps"] += (1 - lost) * (stepping - waiting)
        spent["start" if first else "other"] += rest - stepping
        last, first = event, False
    spent["start" if first else "other"] += start[-1]["time"] - last["time"]
