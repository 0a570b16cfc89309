"""The platform that a computation is traced for: that of this process, or one that it is compiled for ahead of time."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target platform", default=None)


def platform() -> str:
    """What implementations and tile sizes are chosen by."""
    return _target.get() or jax.default_backend()


def compiled_ahead() -> bool:
    """Whether the computation is traced for another machine than this."""
    return _target.get() is not None


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Inside, what is traced is meant for that platform: for ahead-of-time compilation on a machine without it.

    A function that `jax.jit` has traced before keeps its trace: lower functions that are new to this process.

    >>> with compiling_for("tpu"):
    ...     platform()
    'tpu'
    """
    if name not in PLATFORMS:
        raise ValueError(f"platform: expected one of {', '.join(PLATFORMS)}, found {name!r}")
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)
