"""Everything that a training step changes, as one record."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.models import spec as specs
from jaxlm.sharding.rules import param_shardings
from jaxlm.typing import Array, Int, Params


@flax.struct.dataclass
class TrainState:
    """step: updates tried so far, int32. ema: the averaged parameters, or None. num_skipped: updates left out because
    a number was not finite (or no target counted); num_skipped_in_a_row: those since the last good one. frozen:
    parameters that the loss reads and the optimizer leaves alone (a reference model, the base under adapters), or None.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None
    num_skipped: Int[Array, ""]
    num_skipped_in_a_row: Int[Array, ""]
    frozen: Params | None = None


def new_state(params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """The state before the first step."""
    # Copies: the state is donated to the step, and two of its arrays must not be one buffer.
    averaged = jax.tree.map(jnp.copy, params) if ema else None
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zero[0], params, optimizer.init(params), averaged, zero[1], zero[2])


def init_state(
    key: Array,
    spec: specs.Spec,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    ema: bool = False,
    params: Params | None = None,
) -> TrainState:
    """The state on the mesh, from random parameters or from given ones; no device ever holds more than its share."""
    if params is not None:
        specs.check(params, spec)

    def make(key: Array, params: Params | None) -> TrainState:
        return new_state(specs.init(key, spec) if params is None else params, optimizer, ema=ema)

    shardings = state_shardings(spec, optimizer, mesh=mesh, ema=ema)
    return jax.jit(make, out_shardings=shardings)(key, params)


def abstract_state(
    spec: specs.Spec, optimizer: optax.GradientTransformation, *, mesh: Mesh, ema: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its memory: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda p: new_state(p, optimizer, ema=ema), specs.abstract(spec))
    shardings = state_shardings(spec, optimizer, mesh=mesh, ema=ema)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def state_shardings(spec: specs.Spec, optimizer: optax.GradientTransformation, *, mesh: Mesh, ema: bool = False) -> Any:
    """Optimizer statistics lie like the parameter that they mirror (same path, same shape); the rest is replicated."""
    shapes = jax.eval_shape(lambda p: new_state(p, optimizer, ema=ema), specs.abstract(spec))
    placed = {
        tuple(path.split("/")): (specs.flatten(spec)[path].shape, s)
        for path, s in specs.flatten(param_shardings(spec, mesh)).items()
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = tuple(specs.path_name(path).split("/"))
        for start in range(len(names)):
            shape, sharding = placed.get(names[start:], (None, replicated))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(place, shapes)
