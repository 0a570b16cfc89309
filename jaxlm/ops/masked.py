"""The only place where a mask meets a sum: masked entries are replaced before the sum, so a NaN there stays there."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxlm.typing import Array, Bool, Float

Axis = int | Sequence[int] | None


def masked_sum(x: Float[Array, "..."], mask: Bool[Array, "..."] | None, *, axis: Axis = None) -> Float[Array, "..."]:
    """Sum of the entries that the mask keeps.

        sum_i mask_i x_i

    x: any shape. mask: boolean, broadcastable to it (None: all). axis: as in `jnp.sum`.
    Numerics: summed in float32 or wider; all-masked gives 0; a NaN under the mask reaches neither value nor gradient.

    >>> import jax.numpy as jnp
    >>> float(masked_sum(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])))
    4.0
    """
    kept = x if mask is None else jnp.where(mask, x, 0)
    return jnp.sum(kept, axis=axis, dtype=jnp.promote_types(x.dtype, jnp.float32))


def masked_count(x: Array, mask: Bool[Array, "..."] | None, *, axis: Axis = None) -> Float[Array, "..."]:
    """How many entries of x the mask keeps, as float32 (exact up to 2^24 per sum).

    >>> import jax.numpy as jnp
    >>> float(masked_count(jnp.zeros((2, 3)), jnp.array([[True], [False]])))
    3.0
    """
    kept = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)
    return jnp.sum(kept, axis=axis, dtype=jnp.float32)


def masked_mean(x: Float[Array, "..."], mask: Bool[Array, "..."] | None, *, axis: Axis = None) -> Float[Array, "..."]:
    """Mean over the entries that the mask keeps.

        sum_i mask_i x_i / sum_i mask_i

    Arguments and numerics as in `masked_sum`; all-masked gives 0 with a zero gradient.

    >>> import jax.numpy as jnp
    >>> masked_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[True, True], [False, False]]), axis=1).tolist()
    [2.0, 0.0]
    """
    return masked_sum(x, mask, axis=axis) / jnp.maximum(masked_count(x, mask, axis=axis), 1)


def masked_max(x: Float[Array, "..."], mask: Bool[Array, "..."] | None, *, axis: Axis = None) -> Float[Array, "..."]:
    """Largest of the entries that the mask keeps; all-masked gives -inf.

    >>> import jax.numpy as jnp
    >>> float(masked_max(jnp.array([1.0, 9.0, 3.0]), jnp.array([True, False, True])))
    3.0
    """
    return jnp.max(x if mask is None else jnp.where(mask, x, -jnp.inf), axis=axis)
