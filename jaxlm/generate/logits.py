"""From next-token logits to a sampled token: temperature, truncations, and the draw, each a pure function.

A truncation sets what it removes to -inf and leaves the rest as it was, so truncations compose in any order; the order
of `truncate` (top-k, then top-p, then min-p, all after temperature) is the one that Hugging Face users know.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Float, Int, Key


def top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keeps the k largest logits of each row (and ties of the k-th)."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= kth, logits, -jnp.inf)


def top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps the smallest set of most probable tokens whose probabilities sum to at least p, and always one token.

    Source: nucleus sampling, Holtzman et al., 2020, arXiv 1904.09751, section 3.1.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    # A token stays while the mass before it is below p, so the one that crosses p stays too.
    stays = jnp.cumsum(probability, axis=-1) - probability < p
    threshold = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps the tokens whose probability is at least p times that of the most probable one.

    Source: Nguyen et al., 2024, arXiv 2407.01082, section 3.
    """
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def truncate(
    logits: Float[Array, "B V"], *, k: int | None = None, p: float | None = None, minimum: float | None = None
) -> Float[Array, "B V"]:
    """Applies the truncations that are not None: top-k, then top-p of what is left, then min-p."""
    if k is not None:
        logits = top_k(logits, k)
    if p is not None:
        logits = top_p(logits, p)
    if minimum is not None:
        logits = min_p(logits, minimum)
    return logits


def draw(keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """One token per row from softmax(logits), with that row's own key."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
