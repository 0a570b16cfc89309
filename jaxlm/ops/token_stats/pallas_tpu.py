"""The forward pass as one kernel for TPUs: a tile of logits never leaves the vector memory.

Grid (token blocks, vocabulary blocks); the hidden states of a token block stay in memory while the vocabulary streams
by. The tile is kept transposed, [vocabulary, tokens], so that a token's sums run down the sublanes and its state is one
entry of a row: `ROWS` below. The recursion is that of `jaxlm.ops.token_stats.tiled`, as is the backward pass.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.ops.platform import platform
from jaxlm.ops.token_stats.head import Head, Sums, times_log, wide_dtype
from jaxlm.typing import Array, Int

LANES, SUBLANES = 128, 8
BUDGET = 40 << 20
"""Bytes of vector memory that a kernel may use: of 64 MiB on v5p, 128 MiB on v5e and v6e."""
ROWS = ("maximum", "exp", "shifted", "target")
"""Of the kernel's output [8, N]; the others are padding."""


class Blocks(NamedTuple):
    """Tokens and entries of the vocabulary of a tile."""

    tokens: int
    vocab: int

    def vmem(self, width: int, itemsize: int) -> int:
        """Bytes: two buffers of each operand, five float32 tiles, the state."""
        operands = 2 * (self.tokens + self.vocab) * width * itemsize
        return operands + 5 * 4 * self.tokens * self.vocab + 3 * 4 * SUBLANES * self.tokens


def default_blocks(num_tokens: int, width: int, vocab: int, itemsize: int) -> Blocks:
    """The largest tile within the budget, tokens first: each token block reads the whole vocabulary once.

    >>> default_blocks(8192, 4096, 131072, 2)
    Blocks(tokens=1024, vocab=512)
    >>> default_blocks(100, 512, 1000, 4)
    Blocks(tokens=128, vocab=1024)
    """
    most_tokens, most_vocab = (_up(n, LANES) for n in (num_tokens, vocab))
    sizes = [
        Blocks(min(t, most_tokens), min(v, most_vocab))
        for t in (1024, 512, 256, 128)
        for v in (2048, 1024, 512, 256, 128)
    ]
    fits = [blocks for blocks in sizes if blocks.vmem(width, itemsize) <= BUDGET]
    if not fits:
        raise ValueError(f"pallas_tpu: hidden states of width {width} do not fit in the vector memory; use 'tiled'")
    return fits[0]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def sums(
    head: Head, targets: Int[Array, "N"], count: Int[Array, ""] | None, *, soft_cap: float | None, entropy: bool,
    blocks: Blocks | None = None,
) -> Sums:  # fmt: skip
    """The state of every token over the whole vocabulary; tokens from `count` on are skipped, theirs means nothing.

    Interpreted where it is not traced for a TPU. ValueError for a bias or float64.
    """
    if head.bias is not None or wide_dtype(head) != jnp.float32:
        raise ValueError("pallas_tpu: no bias and no float64; use implementation='tiled'")
    (num_tokens, width), vocab = head.hidden.shape, head.unembed.shape[0]
    dtype = head.hidden.dtype
    blocks = blocks or default_blocks(num_tokens, width, vocab, dtype.itemsize)
    number = jnp.full(1, num_tokens, jnp.int32) if count is None else count[None]
    inverse = jnp.ones(1, jnp.float32) if head.temperature is None else 1 / head.temperature.astype(jnp.float32)[None]

    def streamed(i: Array, j: Array, number: Array, inverse: Array) -> tuple[Array, int]:
        return jnp.where(i * blocks.tokens < number[0], j, 0), 0  # where nothing is computed, nothing is fetched

    found = pl.pallas_call(
        partial(
            _kernel,
            blocks=blocks,
            vocab=vocab,
            soft_cap=soft_cap,
            entropy=entropy,
            tempered=head.temperature is not None,
            precision=jax.lax.Precision.HIGHEST if dtype.itemsize >= 4 else None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(num_tokens, blocks.tokens), pl.cdiv(vocab, blocks.vocab)),
            in_specs=[
                pl.BlockSpec((1, blocks.tokens), lambda i, j, *_: (0, i)),
                pl.BlockSpec((blocks.tokens, width), lambda i, j, *_: (i, 0)),
                pl.BlockSpec((blocks.vocab, width), streamed),
            ],
            out_specs=pl.BlockSpec((SUBLANES, blocks.tokens), lambda i, j, *_: (0, i)),
        ),
        out_shape=jax.ShapeDtypeStruct((SUBLANES, num_tokens), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=BUDGET + (16 << 20)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_tokens * width * vocab,
            transcendentals=num_tokens * vocab,
            bytes_accessed=dtype.itemsize * width * (num_tokens + vocab * math.ceil(num_tokens / blocks.tokens)),
        ),
        interpret=platform() != "tpu",
        name="token_stats_forward",
    )(number, inverse, targets[None].astype(jnp.int32), head.hidden, head.unembed.astype(dtype))
    state = dict(zip(ROWS, found))
    return Sums(**state | ({} if entropy else {"shifted": None}))  # type: ignore[arg-type]


def _kernel(
    number, inverse, targets, hidden, unembed, out, *, blocks: Blocks, vocab: int, soft_cap: float | None,
    entropy: bool, tempered: bool, precision,
):  # fmt: skip
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def start():
        lowest = jnp.full((1, blocks.tokens), jnp.finfo(jnp.float32).min)
        out[...] = jnp.zeros_like(out)
        out[0:1, :] = lowest

    @pl.when(i * blocks.tokens < number[0])
    def tile():
        z = jax.lax.dot_general(
            unembed[...], hidden[...], (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
        z = z * inverse[0] if tempered else z
        entry = j * blocks.vocab + jax.lax.broadcasted_iota(jnp.int32, z.shape, 0)
        if vocab % blocks.vocab:  # the last block reads past the end, where anything may stand
            z = jnp.where(entry < vocab, z, -jnp.inf)
        before, total = out[0:1, :], out[1:2, :]
        maximum = jnp.maximum(before, z.max(axis=0, keepdims=True))
        below = z - maximum
        e = jnp.exp(below)
        fall = jnp.where(total > 0, before - maximum, 0)
        rescale = jnp.exp(fall)
        out[0:1, :] = maximum
        out[1:2, :] = rescale * total + e.sum(axis=0, keepdims=True)
        if entropy:
            shifted = rescale * (out[2:3, :] + fall * total)
            out[2:3, :] = shifted + times_log(e, below).sum(axis=0, keepdims=True)
        here = jnp.where(entry == targets[...], z, 0)
        out[3:4, :] = out[3:4, :] + here.sum(axis=0, keepdims=True)
