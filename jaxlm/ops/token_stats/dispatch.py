"""Which implementation of token_stats is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache, partial

from jaxlm.ops.platform import devices, kernels_wanted, platform
from jaxlm.ops.token_stats.contract import Implementation, Output
from jaxlm.ops.token_stats.dense import dense
from jaxlm.ops.token_stats.head import Head
from jaxlm.ops.token_stats.tiled import Kernel, beyond_kernels, module_of, tiled
from jaxlm.typing import Array

KERNELS: Mapping[str, Kernel] = {"pallas_tpu": "pallas_tpu", "mosaic_gpu": "mosaic_gpu"}
"""What the forward pass of `tiled` may be, by name."""
IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "dense": dense,
    "tiled": tiled,
    **{name: partial(tiled, kernel=kernel) for name, kernel in KERNELS.items()},
}
"""Every implementation by name; all give the same numbers."""


def named(name: str) -> Implementation:
    """The implementation of that name; ValueError if there is none."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, or None, found {name!r}")
    return IMPLEMENTATIONS[name]


def best(head: Head, soft_cap: float | None, targets: Array, outputs: tuple[Output, ...], *, whole: bool) -> str:
    """The platform's kernel where it can be had, else `tiled`: BENCHMARKS.md; each logged once.

    whole: the arrays are those of one device. Of a kernel whose operands are split over several without being told, XLA
    would gather them onto each.
    """
    name = platform()
    kernel = "pallas_tpu" if name == "tpu" else "mosaic_gpu" if name == "gpu" and _hopper() else None
    if kernel is None or not kernels_wanted() or not whole or beyond_kernels(targets, outputs):
        return _announced(name, "tiled")
    return _announced(name, "tiled" if module_of(kernel).obstacle(head, soft_cap) else kernel)


def _hopper() -> bool:
    return {str(getattr(device, "compute_capability", "")) for device in devices()} == {"9.0"}


@cache
def _announced(platform_name: str, name: str) -> str:
    logging.getLogger(__name__).info("token_stats on %s: implementation %r", platform_name, name)
    return name
