"""What a computation is traced for: the devices of this process, or those that it is compiled for ahead of time."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


class _Target(NamedTuple):
    platform: str
    devices: tuple[Any, ...]


_target: contextvars.ContextVar[_Target | None] = contextvars.ContextVar("target", default=None)
_kernels = True


def platform() -> str:
    """What implementations and tile sizes are chosen by."""
    target = _target.get()
    return jax.default_backend() if target is None else target.platform


def devices() -> Sequence[Any]:
    """Those that the computation is traced for; none where only their platform is known."""
    target = _target.get()
    return jax.devices() if target is None else target.devices


def device_kind() -> str:
    """Of the first of those, by the name that JAX gives it ("TPU v6 lite"); "" where only their platform is known."""
    found = devices()
    return found[0].device_kind if found else ""


def compiled_ahead() -> bool:
    """Whether the computation is traced for another machine than this."""
    return _target.get() is not None


@contextlib.contextmanager
def compiling_for(name: str, devices: Sequence[Any] = ()) -> Iterator[None]:
    """Inside, what is traced is meant for that platform: for ahead-of-time compilation on a machine without it.

    devices: those of a topology, for what is chosen by more than their platform. A function that `jax.jit` has traced
    before keeps its trace: lower functions that are new to this process.

    >>> with compiling_for("tpu"):
    ...     platform()
    'tpu'
    """
    if name not in PLATFORMS:
        raise ValueError(f"platform: expected one of {', '.join(PLATFORMS)}, found {name!r}")
    token = _target.set(_Target(name, tuple(devices)))
    try:
        yield
    finally:
        _target.reset(token)


def use_kernels(wanted: bool) -> None:
    """Whether this process takes compiled kernels where none is asked for by name; what is traced keeps its choice."""
    global _kernels
    _kernels = wanted


def kernels_wanted() -> bool:
    """False where XLA shall make everything itself, as to see whether a kernel is to blame."""
    return _kernels
