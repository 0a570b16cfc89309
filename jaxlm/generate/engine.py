"""The decoding engine: a fixed number of slots, refilled as rows finish, so that many prompts run at full batch.

A task is one sample of one prompt. Its tokens follow from the parameters, the prompt, the settings and the task's own
key: not from the batch size, its neighbours, or the slot it lands in (up to the rounding of matrix products, whose
order of summation may depend on the batch size).

The prompt is prefilled but for its last token; each decode step then feeds one token and samples the next, so prefill
never touches the vocabulary and the first new token comes out of the same program as every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.logits import draw, truncate
from jaxlm.models import decoder
from jaxlm.models.cache import KVCache, init_cache
from jaxlm.models.config import DecoderConfig
from jaxlm.ops.token_stats import token_stats_from_logits
from jaxlm.typing import Array, Bool, Constrain, Float, Int, Key, Params

MIN_BUCKET = 16
CACHE_AXES = ("layers", "batch", None, "act_kv_heads", None)
"""Logical axes of cached keys and values."""


@flax.struct.dataclass
class Slots:
    """What the device holds: the cache, each slot's pending token, its task's key, and how much it may still write."""

    cache: KVCache
    token: Int[Array, "B"]
    key: Key[Array, "B"]
    num_new: Int[Array, "B"]
    remaining: Int[Array, "B"]


@flax.struct.dataclass
class Emitted:
    """What `decode` wrote, step by step: tokens, and logprob and entropy (nats) of the model's own distribution."""

    token: Int[Array, "C B"]
    logprob: Float[Array, "C B"]
    entropy: Float[Array, "C B"]
    valid: Bool[Array, "C B"]


@partial(jax.jit, static_argnames=("cfg", "num_slots", "max_length", "constrain"))
def init_slots(
    cfg: DecoderConfig, num_slots: int, max_length: int, *, constrain: Constrain = decoder.identity
) -> Slots:
    """Empty slots: none of them is active until `refill` puts a task there."""
    none = jnp.zeros((num_slots,), jnp.int32)
    keys = jax.random.split(jax.random.key(0), num_slots)
    cache = spread(init_cache(cfg, num_slots, max_length), constrain)
    return Slots(cache, token=none, key=keys, num_new=none, remaining=none)


def spread(cache: KVCache, constrain: Constrain) -> KVCache:
    """The cache, its rows over the devices that share a batch and its heads over those that share heads."""
    return cache.replace(keys=constrain(cache.keys, CACHE_AXES), values=constrain(cache.values, CACHE_AXES))  # type: ignore[attr-defined]


def bucket(n: int, smallest: int = MIN_BUCKET) -> int:
    """The smallest power of two that is at least n and `smallest`: few shapes, few compilations.

    >>> [bucket(n) for n in (1, 16, 17, 100)]
    [16, 16, 32, 128]
    """
    return max(smallest, 1 << max(0, n - 1).bit_length())


@partial(jax.jit, static_argnames=("cfg", "constrain"), donate_argnames="slots")
def refill(
    params: Params,
    slots: Slots,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, "R"],
    source: Int[Array, "Q"],
    rows: Int[Array, "Q"],
    keys: Key[Array, "Q"],
    remaining: Int[Array, "Q"],
    *,
    cfg: DecoderConfig,
    constrain: Constrain = decoder.identity,
) -> Slots:
    """Prefills R distinct prompts (right-padded) and starts Q tasks: q puts prompt `source[q]` into slot `rows[q]`.

    A row index beyond the last slot is dropped, so that callers can pad Q.
    """
    prefix = jnp.arange(prompts.shape[1]) < lengths[:, None] - 1
    cache = spread(init_cache(cfg, *prompts.shape), constrain)
    out = decoder.forward(params, prompts, cfg=cfg, segments=prefix.astype(jnp.int32), cache=cache, constrain=constrain)
    width, old = prompts.shape[1], slots.cache
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]

    def put(into: Array, values: Array) -> Array:
        return into.at[rows].set(values, mode="drop")

    return Slots(
        cache=spread(
            KVCache(
                keys=old.keys.at[:, rows, :width].set(out.cache.keys[:, source], mode="drop"),
                values=old.values.at[:, rows, :width].set(out.cache.values[:, source], mode="drop"),
                length=put(old.length, out.cache.length[source]),
            ),
            constrain,
        ),
        token=put(slots.token, last[source]),
        key=put(slots.key, keys),
        num_new=put(slots.num_new, jnp.zeros_like(rows)),
        remaining=put(slots.remaining, remaining),
    )


@partial(
    jax.jit,
    static_argnames=("cfg", "num_steps", "temperature", "k", "p", "minimum", "eos_ids", "constrain"),
    donate_argnames="slots",
)
def decode(
    params: Params,
    slots: Slots,
    *,
    cfg: DecoderConfig,
    num_steps: int,
    temperature: float,
    k: int | None,
    p: float | None,
    minimum: float | None,
    eos_ids: tuple[int, ...],
    constrain: Constrain = decoder.identity,
) -> tuple[Slots, Emitted]:
    """Runs every active slot for `num_steps` tokens; a slot that writes an end token or its last one stops there."""

    def step(slots: Slots, _: Any) -> tuple[Slots, Emitted]:
        active = slots.remaining > 0
        out = decoder.forward(
            params,
            slots.token[:, None],
            cfg=cfg,
            segments=active.astype(jnp.int32)[:, None],
            cache=slots.cache,
            constrain=constrain,
        )
        logits = next_token_logits(params, out.hidden[:, 0], cfg=cfg)
        token = _choose(slots, logits, temperature=temperature, k=k, p=p, minimum=minimum)
        stats = token_stats_from_logits(logits, token, mask=active)
        ended = jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros_like(active)
        following = Slots(
            cache=spread(out.cache, constrain),
            token=jnp.where(active, token, slots.token),
            key=slots.key,
            num_new=slots.num_new + active,
            remaining=jnp.where(active & ~ended, slots.remaining - 1, 0),
        )
        return following, Emitted(token=token, logprob=stats.logprob, entropy=stats.entropy, valid=active)

    return jax.lax.scan(step, slots, None, length=num_steps)


def next_token_logits(params: Params, hidden: Float[Array, "B D"], *, cfg: DecoderConfig) -> Float[Array, "B V"]:
    """Float32 logits of the next token, soft-capped where the model says so."""
    head = decoder.head(params, cfg=cfg)
    unembed = head["unembed"].astype(hidden.dtype)
    logits = jnp.einsum("bd,vd->bv", hidden, unembed, preferred_element_type=jnp.float32)
    if head["bias"] is not None:
        logits = logits + head["bias"]
    return logits if head["soft_cap"] is None else head["soft_cap"] * jnp.tanh(logits / head["soft_cap"])


def _choose(
    slots: Slots, logits: Array, *, temperature: float, k: int | None, p: float | None, minimum: float | None
) -> Array:
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(slots.key, slots.num_new)
    return draw(keys, truncate(logits / temperature, k=k, p=p, minimum=minimum))


def padded_prompts(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts right-padded to a bucketed width and count, and their lengths (1 for rows of padding)."""
    width, count = bucket(max(len(p) for p in prompts)), bucket(len(prompts), 1)
    tokens, lengths = np.zeros((count, width), np.int32), np.ones((count,), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths
