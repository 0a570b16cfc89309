"""Profiler traces of chosen steps: what ran on the devices and the host, for TensorBoard, XProf or Perfetto.

    jaxlm train --config … --config.profile.steps="(100, 101, 102)"

RUN/profile/<first step>/ holds a trace of every run of consecutive steps, from every process. Step n is the update that
leads from n to n + 1. The first one of a start compiles, which hides the rest: choose later ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """steps: the updates that are traced; consecutive ones make one trace."""

    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(step < 0 for step in self.steps):
            raise ValueError(f"profile.steps: expected steps of 0 or more, found {self.steps}")


class Profiler:
    """Told of every step before it is dispatched. drain: waits for the steps under way, so that a trace holds all of
    the chosen ones and nothing of their neighbours."""

    def __init__(
        self, steps: Sequence[int], run_dir: str | os.PathLike[str], *, drain: Callable[[], None]
    ) -> None:
        self._steps, self._dir, self._drain = frozenset(steps), Path(run_dir) / "profile", drain
        self._trace = contextlib.ExitStack()
        self._tracing = False

    def before(self, step: int) -> None:
        """Starts or ends a trace where this step asks for it."""
        chosen = step in self._steps
        if chosen == self._tracing:
            return
        self._drain()
        self.close()
        if chosen:
            self._trace.enter_context(jax.profiler.trace(self._dir / str(step)))
            self._tracing = True

    def close(self) -> None:
        """Ends a trace under way; the caller has waited for its steps."""
        self._trace.close()
        self._tracing = False
