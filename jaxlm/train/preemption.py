"""Stopping a run from outside: a signal asks, the loop obeys at its next step boundary, after saving."""

from __future__ import annotations

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""What a process exits with after a preempted run was saved: EX_TEMPFAIL, "try again"."""


# The coordination service stops all at one more than the largest number that any process has passed, and takes 0 for a
# process that has passed none: a signal before the first call means 1, and the steps of a resumed run begin further on.
_CALLS = itertools.count(1)


class Preempted(SystemExit):
    """The run was asked to stop and has saved itself; uncaught, the process exits with `EXIT_CODE`."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step


class Preemption:
    """Listens for SIGTERM and SIGINT while used as a context manager; a second signal acts at once, as without it.

    Signals reach Python's main thread only; in another thread nothing is listened to. With several processes the
    notice goes through the coordination service instead, so that all of them agree on the step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                self._previous[which] = signal.signal(which, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def asked(self) -> bool:
        """Whether a signal has come to this process."""
        return self._asked

    def agreed(self) -> bool:
        """Whether the run stops before this step; with several processes, called by all of them at every step."""
        if jax.process_count() > 1:
            self._asked = self._asked or multihost_utils.reached_preemption_sync_point(next(_CALLS))
        return self._asked

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)
        self._previous = {}
