"""The logits of a block of the vocabulary, and the gradient that reaches them: shared by what never holds [N, V]."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.token_stats.contract import Output, TokenStats
from jaxlm.typing import Array, Bool, Float, Int


class Head(NamedTuple):
    """What the logits of a block are made of."""

    hidden: Float[Array, "N D"]
    unembed: Float[Array, "V D"]
    bias: Float[Array, "V"] | None
    temperature: Float[Array, ""] | None


class Row(NamedTuple):
    """Per token: the residuals, and the coefficients of dz."""

    maximum: Float[Array, "N"]
    log_total: Float[Array, "N"]
    shift: Float[Array, "N"] | None
    on_target: Float[Array, "N"]
    on_all: Float[Array, "N"]
    on_entropy: Float[Array, "N"] | None


class Sums(NamedTuple):
    """The running state of each token."""

    maximum: Float[Array, "N"]
    exp: Float[Array, "N"]
    shifted: Float[Array, "N"] | None
    target: Float[Array, "N"] | None


def project(head: Head, start: Array | int, width: int) -> Float[Array, "N C"]:
    """A block of hidden @ unembed.T + bias, accumulated in float32."""
    block = take_rows(head.unembed, start, width).astype(head.hidden.dtype)
    u = product(head, head.hidden, block, ((1,), (1,)))
    return u if head.bias is None else u + take_rows(head.bias, start, width).astype(u.dtype)


def activate(u: Float[Array, "N C"], head: Head, soft_cap: float | None) -> Float[Array, "N C"]:
    """Soft-cap, then temperature."""
    if soft_cap is not None:
        u = soft_cap * jnp.tanh(u / soft_cap)
    return u if head.temperature is None else u / head.temperature.astype(u.dtype)


def finish(
    sums: Sums, known: Bool[Array, "N"], outputs: tuple[Output, ...]
) -> tuple[TokenStats, Float[Array, "N"], Float[Array, "N"] | None]:
    """The statistics asked for, and what the backward pass needs of the sums: log l and t / l."""
    # l >= 1 and t <= 0 hold exactly when z and its maximum do; a fused recomputation of z may differ in the last bit.
    total = jnp.where(sums.exp < 1, 1, sums.exp)
    log_total = jnp.log(total)
    shift = None if sums.shifted is None else jnp.where(sums.shifted > 0, 0, sums.shifted) / total
    stats = TokenStats(
        logprob=None if sums.target is None else _logprob(sums, log_total, known),
        entropy=None if shift is None else log_total - shift,
        logsumexp=sums.maximum + log_total if "logsumexp" in outputs else None,
    )
    return stats, log_total, shift


def _logprob(sums: Sums, log_total: Float[Array, "N"], known: Bool[Array, "N"]) -> Float[Array, "N"]:
    logprob = (sums.target - sums.maximum) - log_total
    return jnp.where(known, jnp.where(logprob > 0, 0, logprob), -jnp.inf)


def logit_gradient(row: Row, z: Float[Array, "N C"], on_target: Bool[Array, "N C"]) -> Float[Array, "N C"]:
    """dz = g [target] + p (s - g - h (z - mean)), by the coefficients of `row`."""
    below = z - row.maximum[:, None]
    p = jnp.exp(below - row.log_total[:, None])
    dz = p * row.on_all[:, None] + jnp.where(on_target, row.on_target[:, None], 0)
    if row.on_entropy is None:
        return dz
    return dz - row.on_entropy[:, None] * times_log(p, below - row.shift[:, None])


def target_logit(z: Float[Array, "N C"], index: Int[Array, "N"]) -> Float[Array, "N"]:
    """The target's logit where this block holds it, else 0. Taken from the tile whose maximum was taken."""
    width = z.shape[1]
    picked = jnp.take_along_axis(z, jnp.clip(index, 0, width - 1)[:, None], axis=1)[:, 0]
    return jnp.where(in_vocabulary(index, width), picked, 0)


def is_target(targets: Int[Array, "N"], start: Array | int, width: int) -> Bool[Array, "N C"]:
    """Which entry of the block is the target of each token."""
    return (targets - start)[:, None] == jnp.arange(width, dtype=targets.dtype)


def in_vocabulary(targets: Int[Array, "N"], vocab: int) -> Bool[Array, "N"]:
    """Whether each target is an entry at all."""
    return (targets >= 0) & (targets < vocab)


def times_log(e: Array, log_e: Array) -> Array:
    """e * log_e, and 0 for the logit -inf of a forbidden entry."""
    return e * jnp.where(e > 0, log_e, 0)


def take_rows(x: Array, start: Array | int, width: int) -> Array:
    """Rows start … start + width of x."""
    return jax.lax.dynamic_slice_in_dim(x, start, width)


def product(head: Head, a: Array, b: Array, contract: tuple) -> Array:
    """a times b over the axes of `contract`, accumulated in float32 or wider."""
    # Float32 operands are meant: otherwise GPUs use TF32 for them and TPUs one pass of bfloat16.
    precision = jax.lax.Precision.HIGHEST if head.hidden.dtype.itemsize >= 4 else None
    dtype = wide_dtype(head)
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=dtype)


def wide_dtype(head: Head) -> Any:
    """float32, or the wider dtype of hidden: what everything after the products is computed in."""
    return jnp.promote_types(head.hidden.dtype, jnp.float32)
