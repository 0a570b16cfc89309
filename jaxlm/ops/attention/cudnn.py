"""cuDNN's fused attention, for NVIDIA GPUs from Ampere on: rows that each hold one document, from its first token on.

Its masks are causality and a window by index; it knows neither packed documents nor positions, nor a soft-cap.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.ops.platform import compiled_ahead
from jaxlm.typing import Array, Float

MOST_HEAD_DIM = 128
"""cuDNN takes 256 on some chips and versions only."""


def obstacle(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, in_order: bool, packed: bool, soft_cap: float | None
) -> str | None:
    """Why these arguments cannot go to cuDNN, or None."""
    if not in_order or packed or q.shape[1] != k.shape[1]:
        return "rows of one document each, without positions, segments or a cache"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {q.dtype}"
    if q.shape[3] > MOST_HEAD_DIM or q.shape[3] % 8 or q.shape[1] % 64:
        return f"a head of at most {MOST_HEAD_DIM} entries, a multiple of 8, and a length that is a multiple of 64"
    return None if soft_cap is None else "no soft-cap"


def available() -> bool:
    """Whether this machine's first GPU, or the one that is compiled for, can run it."""
    if compiled_ahead():
        return True
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return capability[:1].isdigit() and float(capability) >= 8  # AMD's name their architecture instead


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *, scale: float,
    window: int | None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Causal attention of rows in order; arguments as in `jaxlm.ops.attention.attention`."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
