"""Collectives on the SparseCores of TPUs that have them, beside the products and not between them."""

from __future__ import annotations

import logging

import jax

from jaxlm.train.chips import chip

_OFFLOADED = ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")
OPTIONS: dict[str, bool | int | str] = {
    **{f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in _OFFLOADED},
    # What the TensorCores would do of the same, by fusions and by sums in place of gathers.
    **{f"xla_tpu_enable_async_collective_fusion_fuse_{kind}": False
       for kind in ("all_gather", "reduce_scatter", "all_reduce")},
    "xla_enable_async_all_gather": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    # How SparseCores run.
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
    "xla_sc_enable_instruction_fusion": False,
}  # fmt: skip
"""What libtpu is told; its defaults on TPU7x come to the same collectives. Source of the names and of what belongs
together: MaxText, benchmarks/xla_flags_library.py. They give the same program another schedule, and not other numbers
than its sums in another order."""


_TOO_LOW = ("O0", "O1")
"""libtpu 0.0.42 then ends the process: its own check of the ring's neighbours fails."""


def compiler_options(device: jax.Device) -> dict[str, bool | int | str]:
    """`OPTIONS` where the device has SparseCores that take collectives, else none, which is logged.

    Over a whole slice libtpu otherwise makes a sum of every scatter, and on v5p of every gather: twice the bytes, by
    the cores that would multiply meanwhile.
    """
    found, log = chip(device), logging.getLogger(__name__)
    if found is None or not found.sparse_cores:
        log.info("no SparseCores on %s: train.sparse_core changes nothing", device.device_kind)
        return {}
    level = jax.config.jax_optimization_level  # type: ignore[attr-defined]
    if level in _TOO_LOW:
        log.warning("at jax_optimization_level=%s libtpu cannot compile for SparseCores: sparse_core is off", level)
        return {}
    return OPTIONS
