"""What chips can do at most: the one table that MFU, plans and rooflines are counted by.

Sources: Google Cloud TPU documentation, the system architecture pages of v4, v5e, v5p, v6e and TPU7x; NVIDIA data
sheets of A100, H100 SXM, H200 SXM and B200 (dense, without sparsity). Network: what a chip sends over all its links to
the chips of its slice or node (ICI; NVLink), one way. Outside: its share of what a host sends to other slices or nodes
(data-centre network; a network card of 200 or 400 Gbit/s for every GPU), after Austin et al. 2025, How to Scale Your
Model, part 2, and the data sheets. SparseCores: those that libtpu gives collectives to (v4's are for embeddings only).
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """flops: dense bfloat16 FLOP/s. memory: bytes. memory_bandwidth, network_bandwidth, outside_bandwidth: bytes/s.
    sparse_cores: number of them that take collectives."""

    flops: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float
    outside_bandwidth: float
    sparse_cores: int = 0


_GIB = 2.0**30
CHIPS = {
    "TPU v4": Chip(275e12, 32 * _GIB, 1.228e12, 300e9, 3.125e9),
    "TPU v5e": Chip(197e12, 16 * _GIB, 0.819e12, 200e9, 3.125e9),
    "TPU v5p": Chip(459e12, 95 * _GIB, 2.765e12, 600e9, 6.25e9, 4),
    "TPU v6e": Chip(918e12, 32 * _GIB, 1.64e12, 400e9, 12.5e9, 2),
    "TPU7x": Chip(2307e12, 192 * _GIB, 7.38e12, 600e9, 12.5e9, 4),
    "NVIDIA A100": Chip(312e12, 80 * _GIB, 2.039e12, 300e9, 25e9),
    "NVIDIA H100": Chip(989e12, 80 * _GIB, 3.35e12, 450e9, 50e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 450e9, 50e9),
    "NVIDIA B200": Chip(2250e12, 180e9, 8e12, 900e9, 50e9),
}

# What JAX calls them, where it is another name; matched as prefixes, longest first.
_KINDS = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e"} | {name: name for name in CHIPS}


def chip(device: jax.Device) -> Chip | None:
    """The device's entry, None where it is not in the table (a CPU, say)."""
    matches = [kind for kind in _KINDS if device.device_kind.startswith(kind)]
    return CHIPS[_KINDS[max(matches, key=len)]] if matches else None


def peak_flops(device: jax.Device | None = None) -> float | None:
    """The chip's dense bf16 peak in FLOP/s, or None where it is not in the table: then there is no MFU."""
    found = chip(jax.devices()[0] if device is None else device)
    return None if found is None else found.flops
