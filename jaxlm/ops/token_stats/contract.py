"""What every implementation of token_stats takes and gives, and the part they share: validation and masking."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Bool, Float, Int

Output = Literal["logprob", "entropy", "logsumexp", "top_logprob", "argmax", "log_sum_squares"]
OUTPUTS: tuple[Output, ...] = ("logprob", "entropy", "logsumexp", "top_logprob", "argmax", "log_sum_squares")


class TokenStats(NamedTuple):
    """Per-token statistics of the next-token distribution, in nats; None where not asked for.

    The last three have no gradient: the log-probability of the likeliest entry, that entry (the first of equal ones),
    and log sum_v p_v^2, that of two draws being the same.
    """

    logprob: Float[Array, "..."] | None = None
    entropy: Float[Array, "..."] | None = None
    logsumexp: Float[Array, "..."] | None = None
    top_logprob: Float[Array, "..."] | None = None
    argmax: Int[Array, "..."] | None = None
    log_sum_squares: Float[Array, "..."] | None = None


@runtime_checkable
class Implementation(Protocol):
    """The statistics of N tokens; see `jaxlm.ops.token_stats` for the meaning of each argument.

    The hidden states of masked tokens are 0, and the caller replaces what comes out for them: they may be skipped.
    """

    def __call__(
        self,
        hidden: Float[Array, "N D"],
        unembed: Float[Array, "V D"],
        targets: Int[Array, "N *K"],
        *,
        mask: Bool[Array, "N"] | None = None,
        bias: Float[Array, "V"] | None,
        temperature: Float[Array, ""] | None,
        soft_cap: float | None,
        outputs: tuple[Output, ...],
    ) -> TokenStats: ...


def check_outputs(outputs: Collection[str]) -> tuple[Output, ...]:
    """The outputs in canonical order, so that any order of asking compiles once."""
    unknown = [name for name in outputs if name not in OUTPUTS]
    if isinstance(outputs, str) or unknown or not outputs:
        raise ValueError(f"outputs: expected a non-empty tuple drawn from {OUTPUTS}, found {outputs!r}")
    return tuple(name for name in OUTPUTS if name in outputs)


def check_temperature(temperature: float | Array) -> Float[Array, ""] | None:
    """The temperature as a constant under differentiation; None for 1, which then costs nothing."""
    if isinstance(temperature, numbers.Real):
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, found {temperature}; use argmax for the limit 0")
        if temperature == 1:
            return None
    if jnp.ndim(temperature):
        raise ValueError(f"temperature: expected a scalar, found shape {jnp.shape(temperature)}")
    return jax.lax.stop_gradient(jnp.asarray(temperature, jnp.result_type(float)))


def check_soft_cap(soft_cap: float | None) -> float | None:
    """The soft-cap as a Python float, or None."""
    if soft_cap is None:
        return None
    if not soft_cap > 0:
        raise ValueError(f"soft_cap: expected a number above 0, or None for no cap, found {soft_cap}")
    return float(soft_cap)


class Options(NamedTuple):
    """What every implementation knows of how products become logits."""

    bias: Float[Array, "V"] | None
    temperature: Float[Array, ""] | None
    soft_cap: float | None


def check_options(
    unembed: Float[Array, "V D"], *, bias: Float[Array, "V"] | None, temperature: float | Array, soft_cap: float | None,
    logit_scale: float, valid_vocab: int | None,
) -> Options:  # fmt: skip
    """The options, the scale s and the bound of the vocabulary expressed by the others:

        cap tanh((s u + b) / cap) / T  =  (cap / s) tanh((u + b / s) / (cap / s)) / (T / s)
    """
    bias = _forbid_beyond(valid_vocab, bias, unembed)
    tempered, soft_cap = check_temperature(temperature), check_soft_cap(soft_cap)
    if not (isinstance(logit_scale, numbers.Real) and logit_scale > 0):
        raise ValueError(f"logit_scale: expected a number above 0, found {logit_scale}")
    if logit_scale == 1:
        return Options(bias, tempered, soft_cap)
    return Options(
        bias=None if bias is None else bias / logit_scale,
        temperature=jnp.asarray(1.0 if tempered is None else tempered, jnp.result_type(float)) / logit_scale,
        soft_cap=None if soft_cap is None else soft_cap / logit_scale,
    )


def _forbid_beyond(
    valid_vocab: int | None, bias: Float[Array, "V"] | None, unembed: Float[Array, "V D"]
) -> Float[Array, "V"] | None:
    vocab = unembed.shape[0]
    if valid_vocab is None or valid_vocab == vocab:
        return bias
    if not 0 < valid_vocab < vocab:
        raise ValueError(f"valid_vocab: expected 1 to {vocab}, the rows of unembed, found {valid_vocab}")
    dtype = jnp.promote_types(unembed.dtype, jnp.float32)
    return jnp.where(jnp.arange(vocab) < valid_vocab, jnp.zeros((), dtype) if bias is None else bias, -jnp.inf)


def check_shapes(
    hidden: Float[Array, "*tokens D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None,
    bias: Float[Array, "V"] | None,
    several: bool = False,
) -> None:
    """Refuses what broadcasting would let through. several: targets may have one more axis."""
    if unembed.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != unembed.shape[1]:
        raise ValueError(
            f"expected hidden [..., D] and unembed [V, D], found {hidden.shape} and {unembed.shape}; "
            "a [D, V] matrix must be transposed"
        )
    tokens = hidden.shape[:-1]
    if several and targets.ndim == hidden.ndim and targets.shape[-1]:
        tokens = (*tokens, targets.shape[-1])
    check_targets(tokens, targets)
    check_mask(hidden.shape[:-1], mask)
    if bias is not None and bias.shape != unembed.shape[:1]:
        raise ValueError(f"expected bias of shape {unembed.shape[:1]}, one per vocabulary entry, found {bias.shape}")


def check_targets(tokens: tuple[int, ...], targets: Array) -> None:
    """Targets are integers of the shape of the tokens."""
    if targets.shape != tokens or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"expected integer targets of shape {tokens}, found {targets.dtype} {targets.shape}")


def check_mask(tokens: tuple[int, ...], mask: Array | None) -> None:
    """A mask is boolean and of the shape of the tokens."""
    if mask is not None and (mask.shape != tokens or mask.dtype != jnp.bool_):
        raise ValueError(
            f"expected a boolean mask of shape {tokens} (True keeps), found {mask.dtype} {mask.shape}; "
            "a float weight multiplies the result instead"
        )


def blank(x: Float[Array, "*tokens D"], mask: Bool[Array, "*tokens"] | None) -> Float[Array, "*tokens D"]:
    """Masked rows replaced by zeros before any product: what stands there, NaN included, cannot reach a gradient."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def silence(stats: TokenStats, mask: Bool[Array, "*tokens"] | None) -> TokenStats:
    """Exactly 0 at masked positions, and with it a zero gradient."""

    def zeroed(x: Array) -> Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0)

    return stats if mask is None else jax.tree.map(zeroed, stats)


def of_tokens(stats: TokenStats, tokens: tuple[int, ...]) -> TokenStats:
    """The statistics of N tokens in the shape of the tokens; those of several targets keep their axis."""
    return jax.tree.map(lambda x: x.reshape(tokens + x.shape[1:]), stats)
