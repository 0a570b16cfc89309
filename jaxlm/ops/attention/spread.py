"""Attention of rows whose positions are split over devices (context parallelism), each of which loops by itself.

A loop over blocks of queries that lie on several devices would fetch every block from its owner. So blocks are dealt
out, part r of P taking blocks r, r + P, r + 2P, …, and the parts stand beside the rows as more rows, with all keys and
values beside each: what crosses the devices is queries and outputs once (all-to-all), keys and values once
(all-gather), and their gradients. Dealt like that, block i of every part sees about as many keys, so that causality
saves all of them the same half of the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxlm.ops.attention import blockwise
from jaxlm.typing import Array, Constrain, Float

HEADS, KV_HEADS = ("act_heads", None), ("act_kv_heads", None)


def parts_of(constrain: Constrain) -> int:
    """Over how many devices a row is split: 1 where nothing is."""
    return getattr(constrain, "length_parts", 1)


def fits(length: int, parts: int) -> bool:
    """Whether each of several parts has whole blocks.

    >>> fits(1024, 4), fits(1024, 16), fits(1024, 1)
    (True, False, False)
    """
    return parts > 1 and length % parts == 0 and blockwise.fits(length // parts, length)


def attention(
    run: Callable[..., Float[Array, "B T N H"]], q: Float[Array, "B T N H"], k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"], *, parts: int, constrain: Constrain, **options: Any,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """`run`, with the arguments of `jaxlm.ops.attention.attention`, its queries spread over devices.

    parts: over how many the axis "length" is split; constrain: pins an array by its logical axes, where "batch_length"
    is that of rows and parts together. The result is that of `run` on one device.
    """
    batch, length = q.shape[:2]
    block = math.gcd(blockwise.block_size(length, length), length // parts)

    def deal(x: Array, *axes: str | None) -> Array:
        x = x.reshape(batch, -1, parts, block, *x.shape[2:])
        x = constrain(x, ("batch", None, "length", None, *axes)).swapaxes(1, 2)
        return constrain(x.reshape(batch * parts, -1, *x.shape[4:]), ("batch_length", None, *axes))

    def beside_each(x: Array, *axes: str | None) -> Array:
        x = constrain(x, ("batch", None, *axes))
        x = jnp.broadcast_to(x[:, None], (batch, parts, *x.shape[1:]))
        x = constrain(x, ("batch", "length", None, *axes))
        return constrain(x.reshape(batch * parts, *x.shape[2:]), ("batch_length", None, *axes))

    where = {name: options.pop(name) for name in ("q_positions", "k_positions", "q_segments", "k_segments")}
    where = {name: x if x is None else (deal if name[0] == "q" else beside_each)(x) for name, x in where.items()}
    out = run(deal(q, *HEADS), beside_each(k, *KV_HEADS), beside_each(v, *KV_HEADS), **where, **options)
    out = constrain(out.reshape(batch, parts, -1, block, *q.shape[2:]), ("batch", "length", None, None, *HEADS))
    out = constrain(out.swapaxes(1, 2), ("batch", None, "length", None, *HEADS))
    return constrain(out.reshape(q.shape), ("batch", "length", *HEADS))
