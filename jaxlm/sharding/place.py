"""Putting arrays where the rules say: activations inside jit, batches from each host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.sharding.rules import RULES, MeshAxes, batch_parts, batch_sharding, mesh_axes, partition_spec
from jaxlm.typing import Array, Batch, Constrain

Axes = tuple[str | None, ...]


def make_constrain(mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> Constrain:
    """The function that pins an activation to the mesh by its logical axes; the identity on one device."""
    return _identity if mesh.size == 1 else _Pin(mesh, rules)


def _identity(x: Array, axes: tuple[str | None, ...]) -> Array:
    return x


@dataclasses.dataclass(frozen=True, eq=False)  # so that it is hashable, as a static argument of jit must be
class _Pin:
    mesh: Mesh
    rules: Mapping[str, MeshAxes]

    def __call__(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, partition_spec(axes, self.rules)))

    def on_each_device(self, run: Callable[..., Array], operands: Sequence[Axes], result: Axes) -> Callable[..., Array]:
        """`run`, of arrays with these logical axes, on each device's part of them: for kernels, which XLA does not
        split. What it computes of a row and head may depend on no other."""
        specs = [partition_spec(axes, self.rules) for axes in (*operands, result)]
        # A kernel does not say over which axes its result varies, so nothing is there to be checked.
        return jax.shard_map(run, mesh=self.mesh, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)

    @property
    def length_parts(self) -> int:
        """Over how many devices a row is split."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes(self.rules["length"]))


def check_batch(mesh: Mesh, *, batch_size: int, num_microbatches: int = 1, sequence_length: int) -> None:
    """Raises ValueError, with the numbers and the way out, unless every micro-batch divides over the mesh."""
    parts = batch_parts(mesh) * num_microbatches
    if batch_size % parts:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by slice*data*fsdp*num_microbatches = {parts}: "
            f"use {max(1, batch_size // parts) * parts} or {-(-batch_size // parts) * parts}"
        )
    if sequence_length % mesh.shape["sequence"]:
        raise ValueError(
            f"sequence_length={sequence_length} is not divisible by mesh.sequence={mesh.shape['sequence']}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows of a batch as global arrays on the mesh; every host contributes its own slice.

    Fields of one value per token lie on the axes of rows and of length, others on that of rows alone.
    """
    length = next(iter(batch.values())).shape[1]
    whole, rows = batch_sharding(mesh), NamedSharding(mesh, partition_spec(("batch", None)))
    where = {name: whole if x.shape[1] == length else rows for name, x in batch.items()}
    if jax.process_count() == 1:
        return {name: jax.device_put(x, where[name]) for name, x in batch.items()}
    return {name: jax.make_array_from_process_local_data(where[name], x) for name, x in batch.items()}


def shard_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows as global arrays that are split by rows alone, whatever the shape of a field behind that."""
    by_row = NamedSharding(mesh, partition_spec(("batch",)))
    if jax.process_count() == 1:
        return {name: jax.device_put(x, by_row) for name, x in batch.items()}
    return {name: jax.make_array_from_process_local_data(by_row, x) for name, x in batch.items()}
