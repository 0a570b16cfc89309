"""The logits of a block of the vocabulary, and the gradient that reaches them: shared by what never holds [N, V]."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.platform import platform
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
    on_target: Float[Array, "N *K"]
    on_all: Float[Array, "N"]
    on_entropy: Float[Array, "N"] | None


class Sums(NamedTuple):
    """The running state of each token."""

    maximum: Float[Array, "N"]
    exp: Float[Array, "N"]
    shifted: Float[Array, "N"] | None
    target: Float[Array, "N *K"] | None
    squares: Float[Array, "N"] | None = None
    argmax: Int[Array, "N"] | None = None


class Gradient(NamedTuple):
    """The gradients of what logits are made of; those of unembed and bias are of the vocabulary, or of a block."""

    hidden: Float[Array, "N D"]
    unembed: Float[Array, "V D"]
    bias: Float[Array, "V"] | None


def project(head: Head, start: Array | int, width: int) -> Float[Array, "N C"]:
    """A block of hidden @ unembed.T + bias, accumulated in float32."""
    block = unembed_rows(head, start, width)
    u = product(head, head.hidden, block, ((1,), (1,)))
    return u if head.bias is None else u + take_rows(head.bias, start, width).astype(u.dtype)


def activate(u: Float[Array, "N C"], head: Head, soft_cap: float | None) -> Float[Array, "N C"]:
    """Soft-cap, then temperature; an entry that the bias forbids stays forbidden."""
    if soft_cap is not None:
        capped = soft_cap * jnp.tanh(u / soft_cap)
        u = capped if head.bias is None else jnp.where(jnp.isneginf(u), u, capped)
    return u if head.temperature is None else u / head.temperature.astype(u.dtype)


def empty_sums(head: Head, targets: Int[Array, "N *K"], outputs: tuple[Output, ...]) -> Sums:
    """The state before any block."""
    zeros = jnp.zeros(head.hidden.shape[:1], wide_dtype(head))
    return Sums(
        maximum=zeros + jnp.finfo(zeros.dtype).min,
        exp=zeros,
        shifted=zeros if "entropy" in outputs else None,
        target=jnp.zeros(targets.shape, zeros.dtype) if "logprob" in outputs else None,
        squares=zeros if "log_sum_squares" in outputs else None,
        argmax=jnp.zeros(zeros.shape, jnp.int32) if "argmax" in outputs else None,
    )


def with_block(sums: Sums, z: Float[Array, "N C"], targets: Int[Array, "N *K"], start: Array | int) -> Sums:
    """The state with the logits of a block added, whose first entry is `start`; targets count from it."""
    # The results do not depend on the shift, so neither do their derivatives.
    highest = z.max(axis=1)
    maximum = jax.lax.stop_gradient(jnp.maximum(sums.maximum, highest))
    below = z - maximum[:, None]
    e = jnp.exp(below)
    fall = jnp.where(sums.exp > 0, sums.maximum - maximum, 0)
    rescale = jnp.exp(fall)
    shifted = sums.shifted
    if shifted is not None:
        shifted = rescale * (shifted + fall * sums.exp) + jnp.sum(times_log(e, below), axis=1)
    target = sums.target
    if target is not None:
        target = target + target_logit(z, targets)
    squares = sums.squares
    if squares is not None:
        squares = rescale**2 * squares + jnp.sum(e**2, axis=1)
    argmax = sums.argmax
    if argmax is not None:
        argmax = jnp.where(highest > sums.maximum, jnp.argmax(z, axis=1) + start, argmax).astype(argmax.dtype)
    return Sums(maximum, rescale * sums.exp + jnp.sum(e, axis=1), shifted, target, squares, argmax)


def finish(
    sums: Sums, known: Bool[Array, "N *K"], outputs: tuple[Output, ...]
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
        top_logprob=-jax.lax.stop_gradient(log_total) if "top_logprob" in outputs else None,
        argmax=sums.argmax,
        log_sum_squares=None if sums.squares is None else _log_sum_squares(sums.squares, log_total),
    )
    return stats, log_total, shift


def _log_sum_squares(squares: Float[Array, "N"], log_total: Float[Array, "N"]) -> Float[Array, "N"]:
    return jax.lax.stop_gradient(jnp.log(jnp.where(squares < 1, 1, squares)) - 2 * log_total)


def _logprob(sums: Sums, log_total: Float[Array, "N"], known: Bool[Array, "N *K"]) -> Float[Array, "N *K"]:
    logprob = (sums.target - along(sums.maximum, sums.target)) - along(log_total, sums.target)
    return jnp.where(known, jnp.where(logprob > 0, 0, logprob), -jnp.inf)


def logit_gradient(row: Row, z: Float[Array, "N C"], targets: Int[Array, "N *K"]) -> Float[Array, "N C"]:
    """dz = g [target] + p (s - g - h (z - mean)), by the coefficients of `row`; targets count from this block."""
    below = z - row.maximum[:, None]
    p = jnp.exp(below - row.log_total[:, None])
    dz = _add_on_targets(p * row.on_all[:, None], row.on_target, targets)
    if row.on_entropy is None:
        return dz
    return dz - row.on_entropy[:, None] * times_log(p, below - row.shift[:, None])


def block_gradient(
    row: Row, u: Float[Array, "N C"], head: Head, targets: Int[Array, "N *K"], soft_cap: float | None
) -> Gradient:
    """The gradients, in float32, that reach a head of one block from its products u = project(head, ...)."""
    z, pull = jax.vjp(partial(activate, head=head, soft_cap=soft_cap), u)
    (du,) = pull(logit_gradient(row, z, targets))
    # One array for both products, not two computations of it fused into them.
    narrow = jax.lax.optimization_barrier(du.astype(head.hidden.dtype))
    return Gradient(
        hidden=product(head, narrow, head.unembed, ((1,), (0,))),
        unembed=product(head, narrow, head.hidden, ((0,), (0,))),
        bias=None if head.bias is None else du.sum(axis=0),
    )


def _add_on_targets(dz: Float[Array, "N C"], on_target: Float[Array, "N *K"], targets: Int[Array, "N *K"]) -> Array:
    width = dz.shape[1]
    if targets.ndim == 1:  # fused into what makes dz
        is_target = targets[:, None] == jnp.arange(width, dtype=targets.dtype)
        return dz + jnp.where(is_target, on_target[:, None], 0)
    here = in_vocabulary(targets, width)
    return dz.at[jnp.arange(len(dz))[:, None], jnp.where(here, targets, width)].add(on_target, mode="drop")


def target_logit(z: Float[Array, "N C"], index: Int[Array, "N *K"]) -> Float[Array, "N *K"]:
    """The target's logit where this block holds it, else 0. Taken from the tile whose maximum was taken."""
    width = z.shape[1]
    picked = jnp.take_along_axis(z, jnp.clip(index, 0, width - 1).reshape(len(z), -1), axis=1)
    return jnp.where(in_vocabulary(index, width), picked.reshape(index.shape), 0)


def along(x: Float[Array, "N"], targets: Array) -> Array:
    """What each token has, to stand beside what each of its targets has."""
    return x.reshape(x.shape + (1,) * (targets.ndim - 1))


def in_vocabulary(targets: Int[Array, "N *K"], vocab: int) -> Bool[Array, "N *K"]:
    """Whether each target is an entry at all."""
    return (targets >= 0) & (targets < vocab)


def times_log(e: Array, log_e: Array) -> Array:
    """e * log_e, and 0 for the logit -inf of a forbidden entry."""
    return e * jnp.where(e > 0, log_e, 0)


def take_rows(x: Array, start: Array | int, width: int) -> Array:
    """Rows start … start + width of x."""
    return jax.lax.dynamic_slice_in_dim(x, start, width)


def unembed_rows(head: Head, start: Array | int, width: int) -> Float[Array, "C D"]:
    """Rows of unembed in the dtype of hidden."""
    rows, dtype = take_rows(head.unembed, start, width), head.hidden.dtype
    if platform() == "tpu" and dtype == jnp.bfloat16 and rows.dtype != dtype:
        # The same numbers. But a mere conversion libtpu moves out of the loop over blocks, to hold all of them twice.
        return jax.lax.optimization_barrier(jax.lax.reduce_precision(rows, 8, 7).astype(dtype))
    return rows.astype(dtype)


def product(head: Head, a: Array, b: Array, contract: tuple) -> Array:
    """a times b over the axes of `contract`, accumulated in float32 or wider."""
    # Float32 operands are meant: otherwise GPUs use TF32 for them and TPUs one pass of bfloat16.
    precision = jax.lax.Precision.HIGHEST if head.hidden.dtype.itemsize >= 4 else None
    dtype = wide_dtype(head)
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=dtype)


def wide_dtype(head: Head) -> Any:
    """float32, or the wider dtype of hidden: what everything after the products is computed in."""
    return jnp.promote_types(head.hidden.dtype, jnp.float32)
