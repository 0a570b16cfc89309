"""Masked tokens skipped: those that count are moved to the front, and tiles without any are not computed.

Shapes stay static: only the number of tiles that do work depends on the mask. A tile that is skipped costs a branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Bool, Int


class Kept(NamedTuple):
    """order: the tokens, those that the mask keeps first, each group in its own order. back: where each token went.
    number: how many are kept."""

    order: Int[Array, "N"]
    back: Int[Array, "N"]
    number: Int[Array, ""]

    def to_front(self, x: Array) -> Array:
        """Rows of x, those of kept tokens first."""
        return _permuted(x, self.order, self.back)

    def put_back(self, x: Array) -> Array:
        """Rows in that order, each at its token's place again."""
        return _permuted(x, self.back, self.order)


def kept_first(mask: Bool[Array, "N"]) -> Kept:
    """The permutation that moves kept tokens to the front, by two running sums.

    >>> kept_first(jnp.array([False, True, False, True])).order.tolist()
    [1, 3, 0, 2]
    """
    count = jnp.sum(mask, dtype=jnp.int32)
    ahead = jnp.cumsum(mask, dtype=jnp.int32)
    place = jnp.arange(len(mask), dtype=jnp.int32)
    back = jnp.where(mask, ahead - 1, count + place - ahead)
    order = jnp.zeros_like(back).at[back].set(place, unique_indices=True)
    return Kept(order, back, count)


@jax.custom_vjp
def _permuted(x: Array, index: Int[Array, "N"], inverse: Int[Array, "N"]) -> Array:
    """Rows of x by a permutation. Its gradient is taken by the inverse, where JAX would scatter it row by row."""
    return _take(x, index)


def _take(x: Array, index: Int[Array, "N"]) -> Array:
    return x.at[index].get(unique_indices=True, mode="promise_in_bounds")


_permuted.defvjp(
    lambda x, index, inverse: (_take(x, index), inverse),
    lambda inverse, g: (_take(g, inverse), None, None),
)


def in_tiles(x: Array, rows: int) -> Array:
    """Filled up with zeros to whole tiles of that many rows."""
    return jnp.pad(x, [(0, -x.shape[0] % rows)] + [(0, 0)] * (x.ndim - 1))


def over_tiles(
    tile: Callable[[Array | int], Any], add: Callable[[Any, Any, Array | int], Any], carry: Any, *, num_tiles: int,
    rows: int, count: Int[Array, ""] | None,
) -> Any:  # fmt: skip
    """Carries `add(carry, tile(t), t)` over the tiles of `rows` tokens; beyond `count` tokens nothing is computed.

    The branch is inside a scan, so that it can be differentiated any number of times; under vmap all is computed.
    """
    if num_tiles == 1 and count is None:
        return add(carry, tile(0), 0)

    def step(carry: Any, t: Array) -> tuple[Any, None]:
        if count is None:
            return add(carry, tile(t), t), None
        return jax.lax.cond(t * rows < count, lambda c: add(c, tile(t), t), lambda c: c, carry), None

    return jax.lax.scan(step, carry, jnp.arange(num_tiles))[0]
