"""The rotations that a config asks for: `RopeConfig` to cos and sin, per kind of layer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxlm.models.config import DecoderConfig, EncoderConfig, RopeConfig
from jaxlm.ops import rope as ops
from jaxlm.typing import Array, Float, Int

Rotation = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]


def rotations(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None, *, cfg: DecoderConfig | EncoderConfig
) -> dict[str, Rotation | None]:
    """cos and sin for each kind of layer in the pattern, computed once a call; None where nothing rotates.

    LongRoPE picks the factors by the last position of each token's own segment, so that packing changes nothing. A
    row that outgrows `original_length` inside a cache keeps the earlier keys as they were turned.
    """
    ropes = {"global": cfg.rope, "local": cfg.rope_local or cfg.rope}
    return {kind: _rotation(ropes[kind], positions, segments, cfg=cfg) for kind in sorted(set(cfg.layer_pattern))}


def _rotation(
    rope: RopeConfig | None, positions: Array, segments: Array | None, *, cfg: DecoderConfig | EncoderConfig
) -> Rotation | None:
    if rope is None:
        return None
    frequencies = ops.inverse_frequencies(int(cfg.head_dim * rope.rotary_fraction), rope.theta)
    if rope.scaling == "longrope":
        short, long = (
            jnp.asarray(frequencies / np.array(f), jnp.float32) for f in (rope.short_factor, rope.long_factor)
        )
        outgrown = _longest(positions, segments)[..., None] >= _original_length(rope)
        return ops.rotation(positions, jnp.where(outgrown, long, short), _attention_factor(rope, cfg=cfg))
    return ops.rotation(positions, _rescaled(frequencies, rope), _attention_factor(rope, cfg=cfg))


def _rescaled(frequencies: np.ndarray, rope: RopeConfig) -> np.ndarray:
    if rope.scaling == "linear":
        return ops.linear_scaling(frequencies, rope.factor)
    if rope.scaling == "llama3":
        return ops.llama3_scaling(
            frequencies,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_length=_original_length(rope),
        )
    if rope.scaling == "yarn":
        return ops.yarn_scaling(
            frequencies,
            theta=rope.theta,
            factor=rope.factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            original_length=_original_length(rope),
        )
    return frequencies


def _attention_factor(rope: RopeConfig, *, cfg: DecoderConfig | EncoderConfig) -> float:
    if rope.scaling not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "yarn":
        return ops.yarn_attention_factor(rope.factor)
    return ops.longrope_attention_factor(cfg.max_length, _original_length(rope))


def _original_length(rope: RopeConfig) -> int:
    assert rope.original_length is not None  # DecoderConfig refuses these scalings without it
    return rope.original_length


def _longest(positions: Array, segments: Array | None) -> Array:
    """The last position in each token's own segment, [B, 1] without segments, else [B, T]."""
    if segments is None:
        return jnp.max(positions, axis=1, keepdims=True)
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1)
