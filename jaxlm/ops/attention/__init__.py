"""Causal attention with grouped heads, segments, windows and soft-caps: one function, an implementation by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from jaxlm.ops.attention import blockwise, cudnn, reference
from jaxlm.ops.platform import platform
from jaxlm.typing import Array, Float, Int

Implementation = Literal["reference", "blockwise", "cudnn"]
ANYWHERE: dict[str, Callable[..., Array]] = {"reference": reference.attention, "blockwise": blockwise.attention}
"""Those that take every argument, on every platform; "cudnn" does neither."""

LOGITS_AT_ONCE = 2048 * 2048
"""Of a row and head, on accelerators: 16 MiB in float32, 0.5 GiB a row with 32 heads."""

_logger = logging.getLogger(__name__)
_announced: set[str] = set()


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    in_order: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each query over the keys that it may see.

    out = softmax(cap * tanh(scale * q k^T / cap)) v, over keys at or before the query, in its segment, in its window
    (see `jaxlm.ops.masks.attention_mask`); without soft_cap the logits are scale * q k^T. N must be a multiple of K:
    query head n reads key/value head n // (N / K). implementation: "reference" (all logits at once; forward mode too),
    "blockwise" (tiles, memory linear in the length; multiples of 128), "cudnn" (NVIDIA GPUs; bfloat16, no segments, no
    soft_cap), or None for the best here (logged once). in_order: the caller's promise that the positions of queries and
    keys are 0 … T - 1, for "cudnn", which counts for itself. A query that may see no key gives 0. Logits and softmax
    are float32; the result has v's dtype.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    hindrance = cudnn.obstacle(q, k, in_order=in_order, packed=q_segments is not None, soft_cap=soft_cap)
    name = implementation or _best(q.shape[1], k.shape[1], cudnn_can=hindrance is None)
    if name not in (*ANYWHERE, "cudnn"):
        raise ValueError(f"unknown attention implementation {name!r}: expected one of {', '.join(ANYWHERE)}, cudnn")
    if name == "cudnn" and hindrance is not None:
        raise ValueError(f"attention: 'cudnn' takes {hindrance}; use 'blockwise'")
    if name not in _announced:
        _announced.add(name)
        _logger.info("attention: %s", name)
    if name == "cudnn":
        return cudnn.attention(q, k, v, scale=scale, window=window)
    return ANYWHERE[name](
        q, k, v, q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments,
        scale=scale, window=window, soft_cap=soft_cap,
    )  # fmt: skip


def _best(num_queries: int, num_keys: int, *, cudnn_can: bool = False) -> str:
    """cuDNN where it can; else tiles as far as the lengths allow: on CPUs always, where they are both faster and
    smaller, and elsewhere where all logits at once would be more than memory can be spent on."""
    if cudnn_can and platform() == "gpu" and cudnn.available():
        return "cudnn"
    if not blockwise.fits(num_queries, num_keys):
        return "reference"
    return "blockwise" if platform() == "cpu" or num_queries * num_keys > LOGITS_AT_ONCE else "reference"
