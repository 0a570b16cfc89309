"""Signs of life of every process of a run, and where it hangs when there are none.

    RUN/heartbeat-<process>.json    {"time": seconds since 1970, "step": steps done}, at most every ten seconds
    RUN/stalled-<process>.txt       the stacks of all threads, each time that no step was done for `stall_s`

On a pod one process that hangs makes all wait. The file whose step or time is behind names it, and its stacks say in
what. Every process writes its own, so the run's folder should be one that all of them share.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from pathlib import Path

EVERY_S = 10.0


class Heartbeat:
    """Told of every finished step; a thread of the interpreter watches for those that do not come.

    stall_s: seconds without a step until the stacks are written, and again as long as it lasts; None: never. A long
    compilation or evaluation counts as no step: its stacks do no harm. end: whether the process ends with status 1 once
    they are written, even while the interpreter hangs, so that its launcher starts the run again.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], *, process: int, stall_s: float | None, end: bool = False
    ) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._written, self._stall_s, self._end = folder / f"heartbeat-{process}.json", 0.0, stall_s, end
        self._stacks = folder / f"stalled-{process}.txt"
        self._file = None if stall_s is None else self._stacks.open("a")
        self._watch()

    def beat(self, step: int) -> None:
        """A step is done."""
        self._watch()
        now = time.time()
        if now - self._written >= EVERY_S:
            self._written = now
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps({"time": now, "step": step}) + "\n")
            part.replace(self._path)

    def close(self) -> None:
        """No more steps are expected."""
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._stacks.stat().st_size:
            self._stacks.unlink()

    def _watch(self) -> None:
        if self._file is not None and self._stall_s is not None:
            faulthandler.dump_traceback_later(self._stall_s, repeat=True, file=self._file, exit=self._end)
