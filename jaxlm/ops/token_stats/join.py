"""The state over the whole vocabulary from those over its parts: blocks of one device, or shards of several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.ops.token_stats.head import Sums
from jaxlm.typing import Array, Bool


def of_parts(part: Callable[[Array | int, int], Sums], vocab: int, block: int) -> Sums:
    """The state over the whole vocabulary from `part(start, width)`, those over blocks of it."""
    if block == vocab:
        return part(0, vocab)
    whole = vocab // block
    parts = jax.lax.map(lambda i: part(i * block, block), jnp.arange(whole))
    if vocab % block:
        last = part(whole * block, vocab % block)
        parts = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), parts, last)
    maximum, found = _rebase(parts, partial(jnp.max, axis=0))
    return jax.tree.map(partial(jnp.sum, axis=0), found)._replace(maximum=maximum)


def over_shards(sums: Sums, known: Bool[Array, "N *K"], axis: str, vocab: int) -> tuple[Sums, Bool[Array, "N *K"]]:
    """The state over the whole vocabulary from that of each shard: one pmax and one psum, of [N] each, and one pmin for
    the argmax. vocab: entries of a shard."""
    highest = sums.maximum
    maximum, parts = _rebase(sums, partial(jax.lax.pmax, axis_name=axis))
    found, present = jax.lax.psum((parts, known.astype(maximum.dtype)), axis)
    if sums.argmax is not None:  # the first of those that have the maximum
        entry = sums.argmax + jax.lax.axis_index(axis) * vocab
        first = jnp.where(highest == maximum, entry, jnp.iinfo(entry.dtype).max)
        found = found._replace(argmax=jax.lax.pmin(first, axis))
    return found._replace(maximum=maximum), present > 0


def _rebase(sums: Sums, most: Callable[[Array], Array]) -> tuple[Array, Sums]:
    """States over parts of the vocabulary, made ready to be added up: their `most`, and each relative to that.

    most: from the maxima of the parts to that of all. Of the result's states the maximum and the argmax are None.
    """
    maximum = most(sums.maximum)
    fall = sums.maximum - maximum
    weight = jnp.exp(fall)
    shifted = None if sums.shifted is None else weight * (sums.shifted + fall * sums.exp)
    squares = None if sums.squares is None else weight**2 * sums.squares
    return maximum, Sums(None, weight * sums.exp, shifted, sums.target, squares)  # type: ignore[arg-type]
