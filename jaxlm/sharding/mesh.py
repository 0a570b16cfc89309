"""The device mesh of a run: five named axes, sizes from one record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("slice", "data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    slice: TPU slices joined by the data-centre network, batch split over them. data: copies of the parameters, batch
    split over them; None takes the devices that the other axes leave. fsdp: parameters and batch split. tensor: heads,
    feed-forward and vocabulary split. sequence: positions split.
    """

    slice: int = 1
    data: int | None = None
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (None: all), with Auto axes; ValueError if the sizes do not fit the devices.

    With several slices, `slice` is laid over the network between them and the other axes within each.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(cfg, len(devices))
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    fixed = {name: getattr(cfg, name) for name in AXES if name != "data"}
    for name, size in {**fixed, "data": 1 if cfg.data is None else cfg.data}.items():
        if size < 1:
            raise ValueError(f"mesh.{name}={size}: expected at least 1")
    others = math.prod(fixed.values())
    written = " x ".join(f"{name}={size}" for name, size in fixed.items() if size > 1) or "1"
    if cfg.data is None and num_devices % others:
        raise ValueError(
            f"{num_devices} devices cannot be split by {written} = {others}: choose sizes that divide them"
        )
    data = num_devices // others if cfg.data is None else cfg.data
    if data * others != num_devices:
        raise ValueError(
            f"the mesh data={data} x {written} needs {data * others} devices, and there are {num_devices}: "
            "change the sizes, or leave mesh.data=None to take what the other axes leave"
        )
    return tuple(data if name == "data" else fixed[name] for name in AXES)


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    slices = {getattr(d, "slice_index", None) for d in devices}
    if sizes[0] > 1 and len(slices) == sizes[0]:
        within, across = (1, *sizes[1:]), (sizes[0], *(1 for _ in sizes[1:]))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices=devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu" and len(devices) > 1:
        # Physical axes are split where no product of whole ones gives a size, as 128 of 16x16x16 chips.
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    return np.array(devices, dtype=object).reshape(sizes)  # no wiring to respect: the order of the list
