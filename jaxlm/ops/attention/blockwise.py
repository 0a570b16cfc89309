"""Attention in plain XLA, tile by tile: an online softmax forward, a backward that recomputes, never [T, S] at once.

Each block of queries visits only the blocks of keys from the first to the last of which it sees anything, so a causal
row costs half of the square and a window its band. These bounds are read from positions and segments at run time;
nothing is assumed about their order. Backward, with p = exp(z - logsumexp) and delta = sum_h dout * out:

    dv += p^T dout        dz = p (dout v^T - delta)        dq += dz k        dk += dz^T q

(dz also through the soft-cap and the scale), on tiles [keys, queries]: that way round no product contracts the leading
axis of its first operand, which is where CPU libraries are slow.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.masks import attention_mask
from jaxlm.ops.platform import platform
from jaxlm.typing import Array, Bool, Float, Int

BLOCK = {"cpu": 128, "tpu": 512, "gpu": 512}
"""Queries and keys in a tile, by platform: its float32 logits, over a few rows and heads, stay in a CPU's cache; on an
accelerator a tile must be work enough for all of it."""


LEAST = 128
"""The smallest tile of any platform."""


class _Plan(NamedTuple):
    """What is fixed at trace time. block: queries and keys in a tile."""

    scale: float
    window: int | None
    soft_cap: float | None
    block: int


class _Where(NamedTuple):
    """Positions and segments of the queries, or of the keys, in blocks."""

    positions: Int[Array, "J B C"]
    segments: Int[Array, "J B C"] | None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "B T N H"]:
    """See `jaxlm.ops.attention.attention`. T and S must be multiples of 128; differentiable in reverse mode only.

    Numerics: products take the dtype of q and accumulate in float32; softmax, and the sums over tiles, are float32.

    Source: Rabe and Staats, 2021, arXiv 2112.05682; the backward, Dao et al., 2022, arXiv 2205.14135, algorithm 4.
    """
    if not fits(q.shape[1], k.shape[1]):
        raise ValueError(
            f"blockwise attention needs multiples of {LEAST} queries and keys, found {q.shape[1]} and {k.shape[1]}: "
            "pad the rows, or take implementation='reference'"
        )
    block = block_size(q.shape[1], k.shape[1])
    plan = _Plan(scale, window, soft_cap, block)
    queries, keys = (
        _Where(_blocks(positions, block), None if segments is None else _blocks(segments, block))
        for positions, segments in ((q_positions, q_segments), (k_positions, k_segments))
    )
    operands = (*(_cut(x, block, kv_heads=k.shape[2]) for x in (q, k, v)), queries, keys)
    parts = [jax.tree.map(lambda x, rows=rows: x[:, rows], operands) for rows in _rows_together(q.shape[0])]
    return _join(jnp.concatenate([_attend(plan, *part) for part in parts], axis=1), q.shape, block)


def _rows_together(batch: int) -> list[slice]:
    """The rows of one loop: all, or on one CPU half of them, since XLA runs a batched product there on one core, and
    two loops that do not depend on each other on two."""
    if jax.device_count() > 1 or platform() != "cpu" or batch % 2:
        return [slice(None)]
    return [slice(0, batch // 2), slice(batch // 2, None)]


def fits(num_queries: int, num_keys: int) -> bool:
    """Whether the lengths are whole blocks.

    >>> fits(512, 128), fits(1, 512)
    (True, False)
    """
    return num_queries % LEAST == 0 and num_keys % LEAST == 0


def block_size(num_queries: int, num_keys: int) -> int:
    """The platform's size, halved until it divides both lengths."""
    return math.gcd(BLOCK.get(platform(), LEAST), num_queries, num_keys)


def _blocks(x: Int[Array, "B T"], block: int) -> Int[Array, "J B C"]:
    return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)


def _cut(x: Float[Array, "B T N H"], block: int, *, kv_heads: int) -> Float[Array, "J B K M H"]:
    """Blocks first; the query heads that share a key head stand below each other, M = N / K * block."""
    batch, _, heads, dim = x.shape
    x = x.reshape(batch, -1, block, kv_heads, heads // kv_heads, dim).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, dim)


def _join(x: Float[Array, "J B K M H"], shape: tuple[int, ...], block: int) -> Float[Array, "B T N H"]:
    """The inverse of `_cut`."""
    x = x.reshape(*x.shape[:3], -1, block, x.shape[-1])
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q: Array, k: Array, v: Array, queries: _Where, keys: _Where) -> Array:
    return _attend_fwd(plan, q, k, v, queries, keys)[0]


def _attend_fwd(plan: _Plan, q: Array, k: Array, v: Array, queries: _Where, keys: _Where) -> tuple[Array, Any]:
    bounds = _bounds(plan, queries, keys)

    def one(_: None, block: Any) -> tuple[None, tuple[Array, Array]]:
        q, where, (start, stop) = block
        rows = jnp.zeros(q.shape[:-1], jnp.float32)
        # A finite start keeps a row that sees no key at exp(-inf) = 0 instead of nan.
        empty = (rows + jnp.finfo(jnp.float32).min, rows, jnp.zeros(q.shape, jnp.float32))
        visit = partial(_accumulate, plan, q, where, k, v, keys)
        top, total, out = jax.lax.fori_loop(start, stop, visit, empty)
        known = jnp.where(total == 0, 1.0, total)
        return None, ((out / known[..., None]).astype(v.dtype), jnp.where(total == 0, 0.0, top + jnp.log(known)))

    _, (out, logsumexp) = jax.lax.scan(one, None, (q, queries, bounds))
    return out, (q, k, v, queries, keys, bounds, out, logsumexp)


def _accumulate(
    plan: _Plan, q: Array, where: _Where, k: Array, v: Array, keys: _Where, j: Array, carry: tuple[Array, ...]
) -> tuple[Array, ...]:
    """The running maximum, total and weighted sum of one block of queries, with block j of the keys."""
    top, total, out = carry
    z = _logits(plan, _dot("bkmh,bksh->bkms", q, _at(k, j)))
    z = jnp.where(_visible(plan, where, _at(keys, j), z.shape[2]), z, -jnp.inf)
    new = jnp.maximum(top, z.max(axis=-1))
    p, fall = jnp.exp(z - new[..., None]), jnp.exp(top - new)
    update = _dot("bkms,bksh->bkmh", p.astype(v.dtype), _at(v, j))
    return new, total * fall + p.sum(axis=-1), out * fall[..., None] + update


def _attend_bwd(plan: _Plan, residuals: Any, dout: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, queries, keys, bounds, out, logsumexp = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    k_turned = k.swapaxes(-1, -2)

    def one(grads: tuple[Array, Array], block: Any) -> tuple[tuple[Array, Array], Array]:
        row, (start, stop) = block[:-1], block[-1]
        visit = partial(_backpropagate, plan, row, (k, k_turned, v), keys)
        dq = jnp.zeros(row[0].swapaxes(-1, -2).shape, jnp.float32)
        dk, dv, dq = jax.lax.fori_loop(start, stop, visit, (*grads, dq))
        return (dk, dv), dq.swapaxes(-1, -2).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one, (zeros, zeros), (q, dout, logsumexp, delta, queries, bounds))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _backpropagate(
    plan: _Plan, row: Any, inputs: tuple[Array, ...], keys: _Where, j: Array, carry: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Adds what one tile gives to dk and dv of block j and to dq [B, K, H, M] of one block of queries."""
    q, dout, logsumexp, delta, where = row
    k, k_turned, v = (_at(x, j) for x in inputs)
    dk, dv, dq = carry
    z, pull = jax.vjp(partial(_logits, plan), _dot("bksh,bkmh->bksm", k, q))
    seen = _visible(plan, where, _at(keys, j), q.shape[2]).swapaxes(-1, -2)
    p = jnp.where(seen, jnp.exp(z - logsumexp[..., None, :]), 0.0)
    dz = p * (_dot("bksh,bkmh->bksm", v, dout) - delta[..., None, :])
    du = pull(dz)[0].astype(q.dtype)
    dk = _add(dk, j, _dot("bksm,bkmh->bksh", du, q))
    dv = _add(dv, j, _dot("bksm,bkmh->bksh", p.astype(q.dtype), dout))
    return dk, dv, dq + _dot("bkhs,bksm->bkhm", k_turned, du)


def _bounds(plan: _Plan, queries: _Where, keys: _Where) -> tuple[Int[Array, "I"], Int[Array, "I"]]:
    """For each block of queries the first block of keys of which it sees anything, and the one after the last."""

    def row(where: _Where) -> Array:
        return jax.lax.map(lambda other: jnp.any(_mask(plan, where, other), axis=(1, 2)), keys)

    seen = jax.lax.map(row, queries).any(axis=2)  # over rows at last: they may lie on other devices
    index = jnp.arange(seen.shape[1], dtype=jnp.int32)
    return jnp.where(seen, index, len(index)).min(axis=1), jnp.where(seen, index + 1, 0).max(axis=1)


def _mask(plan: _Plan, queries: _Where, keys: _Where) -> Bool[Array, "B C C"]:
    return attention_mask(queries.positions, keys.positions, queries.segments, keys.segments, window=plan.window)


def _visible(plan: _Plan, queries: _Where, keys: _Where, rows: int) -> Bool[Array, "B 1 M C"]:
    """The mask of a tile, repeated for each query head that shares a key head."""
    return jnp.tile(_mask(plan, queries, keys), (1, rows // plan.block, 1))[:, None]


def _logits(plan: _Plan, u: Array) -> Array:
    z = u * plan.scale
    return z if plan.soft_cap is None else plan.soft_cap * jnp.tanh(z / plan.soft_cap)


def _dot(shapes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(shapes, a, b, preferred_element_type=jnp.float32)


def _at(x: Any, j: Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, j, keepdims=False), x)


def _add(x: Array, j: Array, update: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, _at(x, j) + update, j, 0)
