"""The key/value cache of a decoder: one slot per position, each row as full as its own length says."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.models.config import DecoderConfig
from jaxlm.typing import Array, Float, Int


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far; slot s of a row holds its token at position s, for s < length."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    length: Int[Array, "B"]


def init_cache(cfg: DecoderConfig, batch: int, max_length: int, *, dtype: Any = None) -> KVCache:
    """An empty cache of `max_length` slots a row, in cfg.dtype unless told otherwise."""
    shape = (cfg.num_layers, batch, max_length, cfg.num_kv_heads, cfg.head_dim)
    dtype = dtype or cfg.dtype
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def write(
    slots: Float[Array, "B S K H"], new: Float[Array, "B T K H"], start: Int[Array, "B"]
) -> Float[Array, "B S K H"]:
    """Puts row b's T new entries into its slots start[b] … start[b]+T-1; those past the last slot are dropped.

    (A dynamic_update_slice would move them back instead, over the row's own tokens.)
    """
    index = start[:, None] + jnp.arange(new.shape[1], dtype=start.dtype)
    return jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(slots, index, new.astype(slots.dtype))
