"""The oracle: all [N, V] logits in float32 (float64 under x64), differentiated by JAX, forward mode included."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.ops.token_stats.contract import Output, TokenStats
from jaxlm.typing import Array, Bool, Float, Int


def dense(
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "N *K"],
    *,
    mask: Bool[Array, "N"] | None = None,
    bias: Float[Array, "V"] | None,
    temperature: Float[Array, ""] | None,
    soft_cap: float | None,
    outputs: tuple[Output, ...],
) -> TokenStats:
    """Statistics of N tokens from materialised logits; holds several [N, V] arrays.

    Numerics: unembed is first rounded to the dtype of hidden, as the fast implementations do; from there on everything
    is float32 or wider, gradients included.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    table = _rounded(unembed, hidden.dtype).astype(wide)
    logits = jnp.matmul(hidden.astype(wide), table.T, precision=jax.lax.Precision.HIGHEST)
    logits = logits if bias is None else logits + bias.astype(wide)
    if soft_cap is not None:
        logits = jnp.where(jnp.isneginf(logits), logits, soft_cap * jnp.tanh(logits / soft_cap))
    return from_logits(logits, targets, temperature=temperature, outputs=outputs)


def from_logits(
    logits: Float[Array, "N V"],
    targets: Int[Array, "N *K"],
    *,
    temperature: Float[Array, ""] | None,
    outputs: tuple[Output, ...],
) -> TokenStats:
    """Statistics of N tokens whose float32 (or wider) logits are at hand."""
    if temperature is not None:
        logits = logits / temperature.astype(logits.dtype)
    log_probs = jax.nn.log_softmax(logits)
    # Where XLA fuses the logits into two loops they may differ in the last bit, and a log-probability exceed 0 by one.
    log_probs = log_probs - jax.lax.stop_gradient(jnp.maximum(log_probs, 0))
    held = jax.lax.stop_gradient(log_probs)
    return TokenStats(
        logprob=_pick(log_probs, targets) if "logprob" in outputs else None,
        entropy=_entropy(log_probs) if "entropy" in outputs else None,
        logsumexp=jax.nn.logsumexp(logits, axis=-1) if "logsumexp" in outputs else None,
        top_logprob=held.max(axis=-1) if "top_logprob" in outputs else None,
        argmax=jnp.argmax(held, axis=-1).astype(jnp.int32) if "argmax" in outputs else None,
        log_sum_squares=jax.nn.logsumexp(2 * held, axis=-1) if "log_sum_squares" in outputs else None,
    )


def _rounded(x: Array, dtype: jnp.dtype) -> Array:
    """x to the precision of dtype, in its own dtype, with the gradient of the identity."""
    # A cast there and back would round the gradient too, and XLA may drop it.
    target = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, exponent_bits=target.nexp, mantissa_bits=target.nmant)
    return x + jax.lax.stop_gradient(rounded - x)


def _pick(log_probs: Float[Array, "N V"], targets: Int[Array, "N *K"]) -> Float[Array, "N *K"]:
    vocab = log_probs.shape[-1]
    known = (targets >= 0) & (targets < vocab)
    index = jnp.where(known, targets, 0).reshape(len(log_probs), -1)
    picked = jnp.take_along_axis(log_probs, index, axis=1).reshape(targets.shape)
    return jnp.where(known, picked, -jnp.inf)


def _entropy(log_probs: Float[Array, "N V"]) -> Float[Array, "N"]:
    # A logit of -inf has probability 0 and adds 0, not 0 * -inf; the 0 stands in before the product, so that the
    # gradient is free of NaN too.
    finite = jnp.where(jnp.isneginf(log_probs), 0, log_probs)
    return -jnp.sum(jnp.exp(log_probs) * finite, axis=-1)
