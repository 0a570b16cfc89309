"""Devices that are not here: what programs are compiled for ahead of time.

    v5p:4x4x8     a slice of TPU v5p: its chips in each direction; needs libtpu (jaxlm[tpu])
    h100:16x8     16 nodes of 8 GPUs each; needs Python 3.12 and jaxlm[cuda]
    cpu:8         this machine, as eight simulated devices

Run it in a process of its own with `ENVIRONMENT` in its environment: libtpu looks for a TPU as soon as it is loaded.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

# The last one: several processes may compile at once, since none of them has a TPU to fight for.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# What XLA has to know of a GPU, from NVIDIA's data sheets and CUDA's table of compute capabilities: multiprocessors,
# bytes of the L2 cache, of the memory, of it per second, GHz, bytes of shared memory of a block at most, capability.
_GPUS = {
    "a100": (108, 40 << 20, 80 << 30, 2039e9, 1.41, 166_912, 8, "NVIDIA A100-SXM4-80GB"),
    "h100": (132, 50 << 20, 80 << 30, 3352e9, 1.98, 232_448, 9, "NVIDIA H100 80GB HBM3"),
    "h200": (132, 60 << 20, 141 << 30, 4800e9, 1.98, 232_448, 9, "NVIDIA H200"),
    "b200": (148, 126 << 20, 180 << 30, 8000e9, 1.97, 232_448, 10, "NVIDIA B200"),
}


def devices_of(topology: str, *, slices: int = 1) -> list[Any]:
    """The devices of a topology, `slices` times; ValueError if it is not known or what it needs is not installed."""
    kind, _, shape = topology.partition(":")
    if kind == "cpu":
        return _cpus(topology, shape)
    return _gpus(kind, shape, topology) if kind in _GPUS else tpu_devices(topology, slices=slices)


def tpu_devices(topology: str, *, slices: int = 1) -> list[Any]:
    """The devices of a topology such as "v5e:2x2"; ValueError if libtpu is missing or does not know it."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: pip install 'jaxlm[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(topology, "tpu", num_slices=slices).devices
    except Exception as error:  # of libtpu's own kinds
        others = ", ".join(f"{gpu}:1x8" for gpu in _GPUS)
        raise ValueError(
            f"topology {topology!r}: expected one such as v5e:2x2, v5p:2x2x1, v6e:2x2, {others}, cpu:8; {error}"
        ) from error


def _cpus(topology: str, number: str) -> list[Any]:
    if not number.isdigit():
        raise ValueError(f"topology {topology!r}: expected a number of devices, as cpu:8")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(number))
    return jax.devices()


def _gpus(kind: str, shape: str, topology: str) -> list[Any]:
    nodes, _, each = shape.partition("x")
    if not (nodes.isdigit() and each.isdigit()):
        raise ValueError(f"topology {topology!r}: expected nodes and GPUs of each, as {kind}:16x8")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ValueError("compiling for a GPU needs its compiler: pip install 'jaxlm[cuda]', on Python 3.12 or later")
    jax.config.update("jax_platforms", "cpu")  # the one that is here
    shape = f"1x{nodes}x{each}"
    return topologies.get_topology_desc("cluster", "cuda", target_config=_target(kind), topology=shape).devices


def _target(kind: str) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    cores, cache, memory, bandwidth, clock, shared, capability, name = _GPUS[kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared + 1024}
  core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(bandwidth)} l2_cache_size: {cache} device_memory_size: {memory} clock_rate_ghz: {clock}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
