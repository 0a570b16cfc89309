"""What every implementation of token_stats takes and gives, and the part they share: validation and masking."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Bool, Float, Int

Output = Literal["logprob", "entropy", "logsumexp"]
OUTPUTS: tuple[Output, ...] = ("logprob", "entropy", "logsumexp")


class TokenStats(NamedTuple):
    """Per-token statistics of the next-token distribution, in nats; None where not asked for."""

    logprob: Float[Array, "..."] | None = None
    entropy: Float[Array, "..."] | None = None
    logsumexp: Float[Array, "..."] | None = None


@runtime_checkable
class Implementation(Protocol):
    """The statistics of N tokens; see `jaxlm.ops.token_stats` for the meaning of each argument.

    The hidden states of masked tokens are 0, and the caller replaces what comes out for them: they may be skipped.
    """

    def __call__(
        self,
        hidden: Float[Array, "N D"],
        unembed: Float[Array, "V D"],
        targets: Int[Array, "N"],
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


def check_shapes(
    hidden: Float[Array, "*tokens D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None,
    bias: Float[Array, "V"] | None,
) -> None:
    """Refuses what broadcasting would let through."""
    if unembed.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != unembed.shape[1]:
        raise ValueError(
            f"expected hidden [..., D] and unembed [V, D], found {hidden.shape} and {unembed.shape}; "
            "a [D, V] matrix must be transposed"
        )
    check_targets(hidden.shape[:-1], targets, mask=mask)
    if bias is not None and bias.shape != unembed.shape[:1]:
        raise ValueError(f"expected bias of shape {unembed.shape[:1]}, one per vocabulary entry, found {bias.shape}")


def check_targets(tokens: tuple[int, ...], targets: Array, *, mask: Array | None) -> None:
    """Targets are integers and the mask is boolean, both of the shape of the tokens."""
    if targets.shape != tokens or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"expected integer targets of shape {tokens}, found {targets.dtype} {targets.shape}")
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
    return stats if mask is None else jax.tree.map(lambda x: jnp.where(mask, x, 0), stats)
