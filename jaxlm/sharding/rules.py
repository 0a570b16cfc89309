"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.models.spec import Param, Spec, path_name

MeshAxes = str | tuple[str, ...] | None

RULES: Mapping[str, MeshAxes] = {
    # parameters
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    # activations and batches
    "batch": ("slice", "data", "fsdp"),
    "batch_replicas": ("slice", "data"),  # of activations whose width is still split as parameters are
    "length": "sequence",
    "batch_length": ("slice", "data", "fsdp", "sequence"),  # rows and parts of their length as one axis
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
}


def partition_spec(axes: Sequence[str | None], rules: Mapping[str, MeshAxes] = RULES) -> PartitionSpec:
    """Logical axes as a PartitionSpec; ValueError for an unknown axis or two axes on the same mesh axis."""
    entries: list[MeshAxes] = []
    taken: dict[str, str] = {}
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"no sharding rule for the logical axis {axis!r}: known are {', '.join(sorted(rules))}")
        entry = None if axis is None else rules[axis]
        for mesh_axis in mesh_axes(entry):
            if mesh_axis in taken:
                raise ValueError(
                    f"logical axes {taken[mesh_axis]!r} and {axis!r} of one array both go to mesh axis {mesh_axis!r}: "
                    "change the rule of one of them"
                )
            taken[mesh_axis] = str(axis)
        entries.append(entry)
    return PartitionSpec(*entries)


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """An entry of a PartitionSpec as a tuple of mesh axes."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def sharding(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh: Mesh,
    *,
    rules: Mapping[str, MeshAxes] = RULES,
    what: str = "array",
) -> NamedSharding:
    """The sharding of one array; ValueError, with both numbers and the way out, if a size does not divide."""
    spec = partition_spec(axes, rules)
    for size, axis, entry in zip(shape, axes, spec):
        parts = math.prod(mesh.shape[a] for a in mesh_axes(entry))
        if size % parts:
            over = "*".join(mesh_axes(entry))
            near = " or ".join(str(n) for n in (size // parts * parts, -(-size // parts) * parts) if n)
            raise ValueError(
                f"{what}: {axis} = {size} is not divisible by {over} = {parts}: use {near}, or another size of {over}"
            )
    return NamedSharding(mesh, spec)


def param_shardings(spec: Spec, mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> Any:
    """The tree of shardings of a spec's parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: sharding(p.shape, p.axes, mesh, rules=rules, what=path_name(path)),
        spec,
        is_leaf=lambda x: isinstance(x, Param),
    )


def batch_sharding(mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> NamedSharding:
    """How every array [B, T] of a batch lies on the mesh."""
    return NamedSharding(mesh, partition_spec(("batch", "length"), rules))


def batch_parts(mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[a] for a in mesh_axes(rules["batch"]))
