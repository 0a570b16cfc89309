"""Which query may see which key: causality, segments and windows, as one boolean array."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Bool, Int


def attention_mask(
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    *,
    window: int | None = None,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """True where the key is at or before the query, of the same nonzero segment, and less than `window` tokens back.

    Segments None: one segment, no padding. window w: a query sees itself and the w - 1 tokens before it. causal False:
    the key may also come after the query, less than `window` tokens ahead.

    >>> p = jnp.arange(3)[None]
    >>> attention_mask(p, p, None, None, window=2).astype(int)[0]
    Array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]], dtype=int32)
    >>> attention_mask(p, p, None, None, window=2, causal=False).astype(int)[0]
    Array([[1, 1, 0],
           [1, 1, 1],
           [0, 1, 1]], dtype=int32)
    """
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    mask = k <= q if causal else jnp.broadcast_to(True, jnp.broadcast_shapes(q.shape, k.shape))
    if window is not None:
        mask &= jnp.abs(q - k) < window
    if q_segments is not None and k_segments is not None:
        mask &= (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] != 0)
    return mask


def segment_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 wherever the segment changes.

    >>> segment_positions(jnp.array([[1, 1, 2, 2, 2, 0]]))
    Array([[0, 1, 0, 1, 2, 0]], dtype=int32)
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    changed = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    starts = jnp.where(changed, index, 0)
    return index - jax.lax.cummax(starts, axis=1)
