"""One tree that states every parameter once: shape, logical axes, initialiser, weight decay.

From it come the initial parameters, abstract shapes, counts, decay masks and the strict check of a loaded checkpoint;
`jaxlm.sharding.rules` turns its axes into shardings.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Params

Initializer = Callable[[Array, tuple[int, ...], Any], Array]
Spec = Any
"""A nested dict whose leaves are `Param`."""


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: its shape, a logical name per axis (None: never sharded), its initialiser, whether it decays."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    decay: bool = True

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a parameter needs one axis name per dimension: shape {self.shape}, axes {self.axes}")


def normal(stddev: float) -> Initializer:
    """Normal initialiser with mean 0 and the given standard deviation."""
    return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Initialiser of zeros."""
    return jnp.zeros(shape, dtype)


def ones(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Initialiser of ones."""
    return jnp.ones(shape, dtype)


def _is_param(x: Any) -> bool:
    return isinstance(x, Param)


def map_spec(f: Callable[[Param], Any], spec: Spec) -> Any:
    """Applies `f` to every `Param` and keeps the tree."""
    return jax.tree.map(f, spec, is_leaf=_is_param)


def stack(spec: Spec, n: int, axis_name: str = "layers") -> Spec:
    """The spec of n copies, stacked on a new axis 0."""
    return map_spec(lambda p: dataclasses.replace(p, shape=(n, *p.shape), axes=(axis_name, *p.axes)), spec)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `layers/attn/q/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """A tree (of specs or of arrays) as a flat dict keyed by `path_name`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_param)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def init(key: Array, spec: Spec, dtype: Any = jnp.float32) -> Params:
    """Initial parameters. Each leaf's key comes from its path, so adding a parameter leaves the others as they were."""

    def leaf(path: tuple[Any, ...], p: Param) -> Array:
        return p.init(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), p.shape, dtype)

    return jax.tree_util.tree_map_with_path(leaf, spec, is_leaf=_is_param)


def abstract(spec: Spec, dtype: Any = jnp.float32) -> Params:
    """The tree of `jax.ShapeDtypeStruct`: what `init` would return, without its memory."""
    return map_spec(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), spec)


def count(spec: Spec) -> int:
    """The number of scalars in all parameters."""
    return sum(math.prod(p.shape) for p in flatten(spec).values())


def decay_mask(spec: Spec) -> Any:
    """A tree of bools: True where weight decay applies (matrices; not norms, biases)."""
    return map_spec(lambda p: p.decay, spec)


def check(params: Params, spec: Spec, *, what: str = "parameters") -> None:
    """Raises ValueError unless the tree and every shape are exactly those of the spec."""
    got, want = flatten(params), flatten(spec)
    missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
    shapes = [
        f"{k}: expected {want[k].shape}, found {got[k].shape}"
        for k in want
        if k in got and tuple(got[k].shape) != want[k].shape
    ]
    if not (missing or extra or shapes):
        return
    lines = [f"{what} do not fit the model's spec"]
    for k in missing[:8]:
        near = difflib.get_close_matches(k, extra, 1)
        lines.append(f"  missing {k}" + (f" (did you mean {near[0]}?)" if near else ""))
    lines += [f"  not in the spec: {k}" for k in extra[:8]] + [f"  wrong shape: {s}" for s in shapes[:8]]
    hidden = sum(max(0, len(x) - 8) for x in (missing, extra, shapes))
    raise ValueError("\n".join(lines + ([f"  … and {hidden} more"] if hidden else [])))
