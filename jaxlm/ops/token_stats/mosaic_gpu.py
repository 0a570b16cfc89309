"""The forward pass as one kernel for Hopper GPUs: a tile of logits never leaves the registers.

A cluster of two thread blocks takes 256 tokens and a split of the vocabulary, and streams the vocabulary by, 256
entries at a time: each tile of `unembed` is fetched once for both. Of a block's three warpgroups one copies, and two
multiply 64 tokens each and fold the tile into their state, in shared memory between tiles: `ROWS` below. The splits of
a token are joined at the end. The recursion is that of `jaxlm.ops.token_stats.tiled`, as is the backward pass; logits
count in units of log 2, so that the exponential is one instruction.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlm.ops.platform import platform
from jaxlm.ops.token_stats.head import Head, Sums
from jaxlm.typing import Array, Float, Int

ROWS = ("maximum", "exp", "shifted", "target")
GROUP, VOCAB, DEPTH = 64, 256, 64
"""Tokens of a warpgroup, entries of the vocabulary and of the width of a tile: 128 registers a thread for logits."""
GROUPS, CLUSTER, STAGES = 2, 2, 4
TOKENS = GROUP * GROUPS * CLUSTER
"""Of a cluster. Four stages of 48 KiB fill the shared memory."""
CORES = 132
"""Streaming multiprocessors of H100 and H200 (SXM), each of which runs one block."""
LOWEST = -1e30
"""Stands for a logit that is not there: finite, as 0 * -inf is not a number."""


def obstacle(head: Head, soft_cap: float | None) -> str | None:
    """Why the kernel cannot do this, or None."""
    if not supported():
        return "jax 0.11 or newer"
    if head.bias is not None or soft_cap is not None:
        return "no bias and no soft-cap"
    if head.hidden.dtype not in (jnp.bfloat16, jnp.float16):
        return f"hidden states in bfloat16 or float16, not {head.hidden.dtype}"
    vocab, width = head.unembed.shape[0], head.hidden.shape[-1]
    if width % DEPTH or vocab % 8:
        return f"a width that is a multiple of {DEPTH} and a vocabulary that is one of 8, not {width} and {vocab}"
    return None


@cache
def supported() -> bool:
    """Whether this JAX has what the kernel is written with."""
    return hasattr(plgpu, "InterpretGPUParams")


def sums(
    head: Head, targets: Int[Array, "N"], count: Int[Array, ""] | None, *, soft_cap: float | None, entropy: bool
) -> Sums:
    """The state of every token over the whole vocabulary; tokens from `count` on are skipped, theirs means nothing.

    Interpreted where it is not traced for a GPU. ValueError for what `obstacle` names.
    """
    hindrance = obstacle(head, soft_cap)
    if hindrance is not None:
        raise ValueError(f"mosaic_gpu takes {hindrance}; use implementation='tiled'")
    num_tokens = head.hidden.shape[0]
    padding = -num_tokens % TOKENS
    number = jnp.full(1, num_tokens, jnp.int32) if count is None else count[None].astype(jnp.int32)
    scale = jnp.full(1, math.log2(math.e), jnp.float32)
    scale = scale if head.temperature is None else scale / head.temperature.astype(jnp.float32)
    splits = _call(
        jnp.pad(head.hidden, ((0, padding), (0, 0))), head.unembed,
        jnp.pad(targets.astype(jnp.int32), (0, padding)), number, scale, entropy=entropy,
    )[..., :num_tokens]  # fmt: skip
    # What was not computed is no number, and the backward pass takes whole tiles, of other sizes.
    valid = jnp.arange(num_tokens) < number[0]
    return _joined(*jnp.where(valid, splits, jnp.array([0.0, 1.0, 0.0, 0.0])[:, None]).swapaxes(0, 1), entropy=entropy)


def _joined(maximum: Array, exp: Array, shifted: Array, target: Array, *, entropy: bool) -> Sums:
    """One state per token from those of the splits [S, N], in nats."""
    most = maximum.max(axis=0)
    fall = maximum - most
    weight = jnp.exp2(fall)
    t = jnp.sum(weight * (shifted + fall * exp), axis=0)
    unit = math.log(2)
    return Sums(most * unit, jnp.sum(weight * exp, axis=0), t * unit if entropy else None, target.sum(axis=0) * unit)


def default_splits(num_tokens: int, vocab: int) -> int:
    """Into how many parts the vocabulary is cut: enough that few tokens, or few that count, still keep all cores busy.

    >>> default_splits(8192, 131072), default_splits(256, 131072), default_splits(256, 300)
    (33, 66, 2)
    """
    clusters = CORES // CLUSTER
    return min(max(clusters // 2, clusters // -(-num_tokens // TOKENS)), -(-vocab // VOCAB))


def _call(
    hidden: Array, unembed: Array, targets: Array, number: Array, scale: Array, *, entropy: bool
) -> Float[Array, "S 4 N"]:
    splits = default_splits(len(hidden), len(unembed))
    interpret: dict[str, Any] = {} if platform() == "gpu" else {"interpret": plgpu.InterpretGPUParams()}
    return plgpu.kernel(
        partial(_kernel, splits=splits, entropy=entropy),
        out_type=jax.ShapeDtypeStruct(
            (splits, len(ROWS), len(hidden)), jnp.float32, manual_axis_type=jax.typeof(hidden).mat
        ),
        grid=(CORES // CLUSTER,) if platform() == "gpu" else (1,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),  # ex2.approx: 2 ulp
        **interpret,
    )(hidden, unembed, targets, number, scale)


def _kernel(hidden, unembed, targets, number, scale, out, *, splits: int, entropy: bool):
    width, vocab = hidden.shape[1], unembed.shape[0]
    tiles = pl.cdiv(vocab, VOCAB)
    per_split = pl.cdiv(tiles, splits)
    layout = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))

    def pipeline(step, context):
        spec = partial(plgpu.BlockSpec, transforms=layout, memory_space=plgpu.SMEM)
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(width // DEPTH,),
            in_specs=[
                spec((GROUPS * GROUP, DEPTH), lambda k: (0, k)),
                spec((VOCAB, DEPTH), lambda k: (0, k), collective_axes=("block",)),
            ],
            memory_registers=40,
            wg_axis="group",
            num_compute_wgs=GROUPS,
            max_concurrent_steps=STAGES,
            compute_context=context,
        )

    def run(buffers, state):
        group = jax.lax.axis_index("group")

        # Blocks of tokens behind the last one that counts are not items at all. Splits are taken one after the other,
        # so that the clusters share the part of the vocabulary that is in the cache.
        blocks = pl.cdiv(number[0], TOKENS)

        @plgpu.nd_loop((blocks * splits,), collective_axes="cluster")
        def _item(info):
            split, block = info.index[0] // blocks, info.index[0] % blocks
            start = (block * CLUSTER + jax.lax.axis_index("block")) * GROUPS * GROUP
            mine = pl.ds(start + group * GROUP, GROUP)

            @pl.when(group < GROUPS)
            def _start():
                for s, value in enumerate((LOWEST, 0, 0, 0)):
                    state[group, s] = _row(jnp.full(GROUP, value, jnp.float32))

            @pl.loop(split * per_split, jnp.minimum((split + 1) * per_split, tiles))
            def _tile(j):
                def multiply(_, x, w, acc):
                    plgpu.wgmma(acc, x.at[pl.ds(group * GROUP, GROUP)], w.transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    return acc

                def context(multiply_all):
                    def folded(acc):
                        multiply_all(acc)
                        target = plgpu.load(targets.at[mine], layout=ROW, optimized=False) - j * VOCAB
                        _fold(acc[...] * scale[0], target, state.at[group], vocab - j * VOCAB, entropy, vocab % VOCAB)

                    pl.run_scoped(folded, plgpu.ACC((GROUP, VOCAB), jnp.float32))

                operands = hidden.at[pl.ds(start, GROUPS * GROUP), :], unembed.at[pl.ds(j * VOCAB, VOCAB), :]
                pipeline(multiply, context)(*operands, allocations=buffers)

            @pl.when(group < GROUPS)
            def _end():
                plgpu.commit_smem()
                for s in range(len(ROWS)):
                    plgpu.copy_smem_to_gmem(state.at[group, s], out.at[split, s, mine])
                plgpu.wait_smem_to_gmem(0)

    nothing = pipeline(lambda *_: None, lambda *_: None)
    pl.run_scoped(
        run,
        nothing.get_allocations(hidden, unembed),
        plgpu.SMEM((GROUPS, len(ROWS), GROUP), jnp.float32),
        collective_axes="group",
    )


ROW = plgpu.Layout.WGMMA.reduce(1)
"""How a warpgroup holds one number per token: as what is left of a tile summed over the vocabulary."""


def _row(x: Float[Array, "N"]) -> Float[Array, "N"]:
    return plgpu.layout_cast(x, ROW)


def _fold(z: Float[Array, "N C"], target: Int[Array, "N"], state, left: Array, entropy: bool, ragged: int) -> None:
    """Adds a tile of logits to the state; `left` of its entries exist, and target counts from its first."""
    entry = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA)
    if ragged:
        z = jnp.where(entry < left, z, LOWEST)
    before, total = _row(state[0]), _row(state[1])
    maximum = jnp.maximum(before, z.max(axis=1))
    below = z - jax.lax.broadcast_in_dim(maximum, z.shape, [0])
    e = jnp.exp2(below)
    fall = jnp.where(total > 0, before - maximum, 0)
    rescale = jnp.exp2(fall)
    if entropy:
        state[2] = rescale * (_row(state[2]) + fall * total) + (e * below).sum(axis=1)
    state[1] = rescale * total + e.sum(axis=1)
    state[0] = maximum
    here = jnp.where(entry == jax.lax.broadcast_in_dim(target, z.shape, [0]), z, 0)
    state[3] = _row(state[3]) + here.sum(axis=1)
