"""Attention in plain XLA: all logits at once, [B, N, T, S] in float32. The oracle of every other implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.ops.masks import attention_mask
from jaxlm.typing import Array, Float, Int


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
    """See `jaxlm.ops.attention.attention`."""
    weights = probabilities(
        q, k, q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments,
        scale=scale, window=window, soft_cap=soft_cap,
    )  # fmt: skip
    return weighted_sum(weights, v)


def probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    causal: bool = True,
) -> Float[Array, "B N T S"]:
    """The attention weights in float32; rows of queries that may see no key are 0."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    mask = attention_mask(q_positions, k_positions, q_segments, k_segments, window=window, causal=causal)
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    # A finite maximum keeps rows without any key at exp(-inf) = 0 instead of nan; it shifts, so it has no gradient.
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(top)
    unnormalised = jnp.exp(logits - top)
    total = jnp.sum(unnormalised, axis=-1, keepdims=True)
    weights = unnormalised / jnp.where(total == 0, 1.0, total)
    return weights.reshape(batch, heads, length, k.shape[1])


def weighted_sum(weights: Float[Array, "B N T S"], v: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
    """The values averaged by the weights, accumulated in float32, in v's dtype."""
    batch, heads, length, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[2], -1, length, keys).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", grouped, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, v.shape[3]).astype(v.dtype)
