"""Causal attention with grouped heads, segments, windows and soft-caps: one function, an implementation by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Literal

from jaxlm.ops.attention import blockwise, cudnn, reference, splash
from jaxlm.ops.platform import kernels_wanted, platform
from jaxlm.typing import Array, Constrain, Float, Int

Implementation = Literal["reference", "blockwise", "cudnn", "splash"]
ANYWHERE: dict[str, Callable[..., Array]] = {"reference": reference.attention, "blockwise": blockwise.attention}
"""Those that take every argument, on every platform; the kernels "cudnn" and "splash" do neither."""

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
    constrain: Constrain | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each query over the keys that it may see.

    out = softmax(cap * tanh(scale * q k^T / cap)) v, over keys at or before the query, in its segment, in its window
    (see `jaxlm.ops.masks.attention_mask`); without soft_cap the logits are scale * q k^T. N must be a multiple of K:
    query head n reads key/value head n // (N / K). implementation: "reference" (all logits at once; forward mode too),
    "blockwise" (tiles, memory linear in the length; multiples of 128), "cudnn" (NVIDIA GPUs; bfloat16, no segments, no
    soft_cap), "splash" (TPUs, interpreted elsewhere; multiples of 128), or None for the best here (logged once).
    in_order: the caller's promise that queries and keys are the same tokens, each segment in one piece and its
    positions growing by one, for the kernels, which count for themselves. constrain: what pins activations to the
    mesh (None: one device), for "splash", which XLA does not split. A query that may see no key gives 0. Logits and
    softmax are float32; the result has v's dtype.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    packed = q_segments is not None
    hindrances = obstacles(q, k, in_order=in_order, packed=packed, soft_cap=soft_cap, constrain=constrain)
    name = implementation or _best(q.shape[1], k.shape[1], [kernel for kernel in hindrances if not hindrances[kernel]])
    if name not in (*ANYWHERE, *hindrances):
        known = ", ".join((*ANYWHERE, *hindrances))
        raise ValueError(f"unknown attention implementation {name!r}: expected one of {known}")
    if hindrances.get(name) is not None:
        raise ValueError(f"attention: {name!r} takes {hindrances[name]}; use 'blockwise'")
    if name not in _announced:
        _announced.add(name)
        _logger.info("attention: %s", name)
    if name == "cudnn":
        return cudnn.attention(q, k, v, scale=scale, window=window)
    if name == "splash":
        return splash.attention(
            q, k, v, segments=q_segments, scale=scale, window=window, soft_cap=soft_cap, constrain=constrain
        )
    return ANYWHERE[name](
        q, k, v, q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments,
        scale=scale, window=window, soft_cap=soft_cap,
    )  # fmt: skip


def obstacles(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, in_order: bool, packed: bool, soft_cap: float | None,
    constrain: Constrain | None = None,
) -> dict[str, str | None]:  # fmt: skip
    """Each kernel, and what it takes where it cannot take these arguments of `attention` (None: it can)."""
    return {
        "cudnn": cudnn.obstacle(q, k, in_order=in_order, packed=packed, soft_cap=soft_cap),
        "splash": splash.obstacle(q, k, in_order=in_order, constrain=constrain),
    }


def kernel_of(platform_name: str) -> str | None:
    """The kernel that is compiled for that platform, or None."""
    if platform_name == "gpu":
        return "cudnn" if cudnn.available() else None
    return "splash" if platform_name == "tpu" else None


def _best(num_queries: int, num_keys: int, kernels: Collection[str] = ()) -> str:
    """The platform's kernel where it can; else tiles as far as the lengths allow: on CPUs always, where they are both
    faster and smaller, and elsewhere where all logits at once would be more than memory can be spent on."""
    kernel = kernel_of(platform())
    if kernel is not None and kernel in kernels and kernels_wanted():
        return kernel
    if not blockwise.fits(num_queries, num_keys):
        return "reference"
    return "blockwise" if platform() == "cpu" or num_queries * num_keys > LOGITS_AT_ONCE else "reference"
