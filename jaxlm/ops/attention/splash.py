"""JAX's splash attention, a kernel for TPUs: rows in order, packed or not, with windows and soft-caps.

Its masks are causality and a window by index, and equality of segments: what positions say, where each document lies
in one piece. Blocks of which nothing is seen by index are never visited.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.ops.platform import compiled_ahead, platform
from jaxlm.typing import Array, Constrain, Float, Int

LANES = 128
BLOCK = 512
"""Queries and keys in a tile: 1 MiB of float32 logits in the vector memory, as MaxText has it."""


def obstacle(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], *, in_order: bool, constrain: Constrain | None
) -> str | None:
    """Why these arguments cannot go to the kernel, or None."""
    if not in_order or q.shape[1] != k.shape[1]:
        return "rows in order, without positions of their own or a cache"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"bfloat16 or float32, not {q.dtype}"
    if q.shape[1] % LANES or q.shape[3] % 64:
        return f"a length that is a multiple of {LANES} and a head of a multiple of 64 entries"
    return None if _whole_rows(constrain) else "rows that are whole on a device, on a mesh that `constrain` knows"


def _whole_rows(constrain: Constrain | None) -> bool:
    """XLA splits no kernel: it would gather the operands onto every device, so each is given its own by hand."""
    if hasattr(constrain, "on_each_device"):
        return constrain.length_parts == 1
    return compiled_ahead() or jax.device_count() == 1


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *,
    segments: Int[Array, "B T"] | None, scale: float, window: int | None, soft_cap: float | None,
    constrain: Constrain | None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Causal attention of rows in order; arguments as in `jaxlm.ops.attention.attention`. Interpreted but on TPUs.

    Numerics: q is scaled before the product, so that its entries are rounded to their dtype once more.
    """
    run = _on_device(q.shape[1], window=window, soft_cap=soft_cap)
    operands = ((q.astype(jnp.float32) * scale).astype(q.dtype), k, v, *(() if segments is None else (segments,)))
    if hasattr(constrain, "on_each_device"):
        heads = (("batch", None, "act_heads", None), *(("batch", None, "act_kv_heads", None),) * 2)
        run = constrain.on_each_device(run, (*heads, *(("batch", None),) * (segments is not None)), heads[0])
    out = run(*operands)
    return out if segments is None else jnp.where((segments != 0)[:, :, None, None], out, 0)


def _on_device(length: int, *, window: int | None, soft_cap: float | None) -> Callable[..., Array]:
    """(q, k, v, segments) -> out of the rows and heads that a device has."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # costs more than all else of this package

    block = math.gcd(BLOCK, length)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    seen: Any = splash.CausalMask((length, length))
    if window is not None:
        seen = splash.LocalMask((length, length), window_size=(window - 1, 0), offset=0)

    def run(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
        kernel = splash.make_splash_mha(
            mask=splash.MultiHeadMask([seen] * q.shape[2]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=soft_cap, interpret=platform() != "tpu",
        )  # fmt: skip

        def row(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
            same = None if segments is None else splash.SegmentIds(segments, segments)
            return kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), same).swapaxes(0, 1)

        return jax.vmap(row, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)

    return run
