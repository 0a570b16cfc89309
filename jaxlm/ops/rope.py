"""Rotary position embedding and its published rescalings, on arrays.

Convention: a head's rotated entries are split in two halves, and entry i of the first half turns with entry i of the
second ("rotate half", as Hugging Face checkpoints store them).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxlm.typing import Array, Float, Int


def inverse_frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """Angular speed of each pair of entries: theta^(-2i/rotary_dim), float64 [rotary_dim/2], radians per token.

    Source: Su et al., 2021, arXiv 2104.09864, section 3.2.2.

    >>> inverse_frequencies(4, 10_000.0)
    array([1.  , 0.01])
    """
    return theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def linear_scaling(frequencies: np.ndarray, factor: float) -> np.ndarray:
    """Positions interpolated: every frequency divided by `factor`. Source: Chen et al., 2023, arXiv 2306.15595."""
    return frequencies / factor


def llama3_scaling(
    frequencies: np.ndarray, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> np.ndarray:
    """Llama 3.1's rescaling: long waves are slowed by `factor`, short ones stay, those between are blended.

    With wavelength w = 2 pi / f: w > original_length / low_freq_factor gives f / factor; w < original_length /
    high_freq_factor gives f; between, linear in original_length / w. Source: the Llama 3.1 release (Grattafiori et
    al., 2024, arXiv 2407.21783), reference code.
    """
    turns = original_length * frequencies / (2 * math.pi)
    blend = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def yarn_scaling(
    frequencies: np.ndarray,
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_length: int,
) -> np.ndarray:
    """YaRN: pairs that turn fewer than beta_slow times in the original length are slowed, more than beta_fast kept.

    The ramp between is linear in the index of the pair, its ends rounded outwards. Source: Peng et al., 2023,
    arXiv 2309.00071, section 3.2, with the released code's ramp.
    """
    dim = 2 * len(frequencies)

    def index_of(turns: float) -> float:
        return dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(beta_fast)), 0)
    high = min(math.ceil(index_of(beta_slow)), dim - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def yarn_attention_factor(factor: float) -> float:
    """YaRN's multiplier of cos and sin: 0.1 ln(factor) + 1 (1 for factor <= 1). Source: arXiv 2309.00071, eq. 22."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def longrope_attention_factor(max_length: int, original_length: int) -> float:
    """LongRoPE's multiplier of cos and sin: sqrt(1 + ln(s) / ln(original_length)) for s = max_length/original_length.

    Source: Ding et al., 2024, arXiv 2402.13753, and the Phi-3 release.
    """
    scale = max_length / original_length
    return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original_length))


def rotation(
    positions: Int[Array, "B T"], frequencies: np.ndarray | Float[Array, "... R"], scale: float = 1.0
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """cos and sin of position * frequency, times `scale`, in float32.

    frequencies: radians per token, [R], or anything that broadcasts to [B, T, R].
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]
) -> Float[Array, "B T N H"]:
    """Turns the first 2R entries of each head; the others pass through. Computed in float32, returned in x's dtype."""
    half = cos.shape[-1]
    turned, rest = jnp.split(x.astype(jnp.float32), [2 * half], axis=-1)
    cos, sin = (jnp.concatenate(pair, axis=-1)[:, :, None, :] for pair in ((cos, cos), (-sin, sin)))
    # Whole heads times two tables, and not half by half: a CPU runs this four times as fast.
    turned = turned * cos + jnp.roll(turned, half, axis=-1) * sin
    return (jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned).astype(x.dtype)
