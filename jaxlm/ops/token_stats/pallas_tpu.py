"""The forward pass as one kernel for TPUs: a tile of logits never leaves the vector memory.

Grid (token blocks, vocabulary blocks); the hidden states of a token block stay in memory while the vocabulary streams
by. The tile is kept transposed, [vocabulary, tokens], so that a token's sums run down the sublanes and its state is one
entry of a row: `ROWS` below. The recursion is that of `jaxlm.ops.token_stats.tiled`, as is the backward pass.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.ops.platform import platform
from jaxlm.ops.token_stats.head import Head, Sums, wide_dtype
from jaxlm.typing import Array, Int

LANES, SUBLANES = 128, 8
BUDGET = 40 << 20
"""Bytes of vector memory that a kernel may use: of 64 MiB on v5p, 128 MiB on v5e and v6e."""
ROWS = ("maximum", "exp", "shifted", "target")
"""Of the kernel's output [8, N]; the others are padding."""
AT_ONCE = 256
"""Tokens of a tile that meet the block at once: while their sums are made the next ones are multiplied."""
LOWEST = -1e30
"""Stands for a logit that is not there: finite, as 0 * -inf is not a number."""


class Blocks(NamedTuple):
    """Tokens and entries of the vocabulary of a tile."""

    tokens: int
    vocab: int

    def vmem(self, width: int, itemsize: int) -> int:
        """Bytes: two buffers of each operand, five float32 tiles, the state."""
        operands = 2 * (self.tokens + self.vocab) * width * itemsize
        return operands + 5 * 4 * self.tokens * self.vocab + 3 * 4 * SUBLANES * self.tokens

    def steps(self, num_tokens: int, vocab: int) -> int:
        """Of the grid."""
        return -(-num_tokens // self.tokens) * -(-vocab // self.vocab)


def default_blocks(num_tokens: int, width: int, vocab: int, itemsize: int) -> Blocks:
    """The largest tile within the budget, tokens first: each token block reads the whole vocabulary once.

    >>> default_blocks(8192, 4096, 131072, 2)
    Blocks(tokens=1024, vocab=512)
    >>> default_blocks(100, 512, 1000, 4)
    Blocks(tokens=128, vocab=1024)
    """
    fits = _fitting(num_tokens, width, vocab, itemsize)
    if not fits:
        raise ValueError(f"pallas_tpu: hidden states of width {width} do not fit in the vector memory; use 'tiled'")
    return fits[0]


def _fitting(num_tokens: int, width: int, vocab: int, itemsize: int) -> list[Blocks]:
    most_tokens, most_vocab = (_up(n, LANES) for n in (num_tokens, vocab))
    sizes = [
        Blocks(min(t, most_tokens), min(v, most_vocab))
        for t in (1024, 512, 256, 128)
        for v in (2048, 1024, 512, 256, 128)
    ]
    return [blocks for blocks in sizes if blocks.vmem(width, itemsize) <= BUDGET]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def obstacle(head: Head, soft_cap: float | None) -> str | None:
    """Why the kernel cannot do this, or None."""
    if head.bias is not None or wide_dtype(head) != jnp.float32:
        return "no bias and no float64"
    width = head.hidden.shape[-1]
    if not _fitting(LANES, width, LANES, head.hidden.dtype.itemsize):
        return f"hidden states of less than {width} entries, which the vector memory holds"
    return None


def sums(
    head: Head, targets: Int[Array, "N"], count: Int[Array, ""] | None, *, soft_cap: float | None, entropy: bool,
    blocks: Blocks | None = None,
) -> Sums:  # fmt: skip
    """The state of every token over the whole vocabulary; tokens from `count` on are skipped, theirs means nothing.

    Interpreted where it is not traced for a TPU. ValueError for what `obstacle` names.
    """
    hindrance = obstacle(head, soft_cap)
    if hindrance is not None:
        raise ValueError(f"pallas_tpu takes {hindrance}; use implementation='tiled'")
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
        out_shape=jax.ShapeDtypeStruct(
            (SUBLANES, num_tokens), jnp.float32, manual_axis_type=jax.typeof(head.hidden).mat
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=BUDGET + (16 << 20)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_tokens * width * vocab,
            transcendentals=num_tokens * vocab,
            bytes_accessed=dtype.itemsize * width * (num_tokens + vocab * math.ceil(num_tokens / blocks.tokens)),
        ),
        interpret=False if platform() == "tpu" else pltpu.InterpretParams(),
        name="token_stats_forward",
    )(number, inverse, targets[None].astype(jnp.int32), head.hidden, head.unembed)
    state = dict(zip(ROWS, found))
    return Sums(**state | ({} if entropy else {"shifted": None}))  # type: ignore[arg-type]


def _kernel(
    number, inverse, targets, hidden, unembed, out, *, blocks: Blocks, vocab: int, soft_cap: float | None,
    entropy: bool, tempered: bool, precision,
):  # fmt: skip
    i, j = pl.program_id(0), pl.program_id(1)
    counts, last = i * blocks.tokens < number[0], vocab // blocks.vocab

    @pl.when(j == 0)
    def start():
        out[...] = jnp.zeros_like(out)
        out[0:1, :] = jnp.full((1, blocks.tokens), LOWEST)

    def fold(at: Any, behind: int | None) -> None:
        z = jax.lax.dot_general(
            unembed[...], hidden[at, :], (((1,), (1,)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
        z = z * inverse[0] if tempered else z
        row = jax.lax.broadcasted_iota(jnp.int32, z.shape, 0)
        z = z if behind is None else jnp.where(row < behind, z, LOWEST)
        here = jnp.where(row == targets[:, at] - j * blocks.vocab, z, 0)
        before, total = out[0:1, at], out[1:2, at]
        maximum = jnp.maximum(before, z.max(axis=0, keepdims=True))
        below = z - maximum
        e = jnp.exp(below)
        fall = jnp.where(total > 0, before - maximum, 0)
        rescale = jnp.exp(fall)
        out[0:1, at] = maximum
        out[1:2, at] = rescale * total + e.sum(axis=0, keepdims=True)
        if entropy:
            shifted = rescale * (out[2:3, at] + fall * total)
            out[2:3, at] = shifted + (e * below).sum(axis=0, keepdims=True)
        out[3:4, at] = out[3:4, at] + here.sum(axis=0, keepdims=True)

    def tile(behind: int | None) -> None:
        for first in range(0, blocks.tokens, AT_ONCE):
            fold(pl.ds(first, min(AT_ONCE, blocks.tokens - first)), behind)

    @pl.when(counts & (j < last))
    def whole():
        tile(None)

    if vocab % blocks.vocab:  # the last block reads past the end, where anything may stand

        @pl.when(counts & (j == last))
        def ragged():
            tile(vocab % blocks.vocab)
