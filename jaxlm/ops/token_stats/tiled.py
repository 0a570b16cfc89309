"""Plain XLA, a tile of tokens against a block of the vocabulary at a time: no [N, V] array, forward or backward.

Forward, one online pass. State per token: running maximum m, and over the entries seen so far l = sum e,
t = sum e * (z - m) with e = exp(z - m), and a, the target's logit. A block that raises the maximum to m' rescales by
r = exp(m - m'):

    l' = r l + sum e        t' = r (t + (m - m') l) + sum e (z - m')        a' = a + [target in block] z_target

    logsumexp = m + log l   logprob = (a - m) - log l                       entropy = log l - t / l

t is shifted by the maximum, so l >= 1 and t <= 0: a log-probability is never positive and an entropy never negative,
and a common offset of the logits costs no digits. Backward recomputes z; with cotangents (g, h, s):

    dz = g [target] + p (s - g - h (z - mean))      p = exp(z - m - log l)      z - mean = z - m - t / l
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.platform import device_kind, platform
from jaxlm.ops.token_stats.compact import in_tiles, kept_first, over_tiles
from jaxlm.ops.token_stats.contract import Output, TokenStats
from jaxlm.ops.token_stats.head import (
    Gradient,
    Head,
    Row,
    Sums,
    activate,
    block_gradient,
    empty_sums,
    finish,
    in_vocabulary,
    project,
    take_rows,
    unembed_rows,
    wide_dtype,
    with_block,
)
from jaxlm.ops.token_stats.join import of_parts, over_shards
from jaxlm.typing import Array, Bool, Float, Int

TILE_ELEMENTS = {"cpu": 1 << 20, "tpu": 1 << 23, "gpu": 3 << 24}
"""Logits held at once, by platform: what fits the caches, the vector memory, or fills the device."""
WIDER = {"TPU v6 lite": 4}
"""How many times as many the backward pass holds, by chip: with every block the gradient of hidden goes to memory and
back, which its products outrun."""
LEAST_BLOCK = {"tpu": 1 << 10}
"""The narrowest block, by platform."""
MOST_BLOCK = {"cpu": 1 << 11, "tpu": 1 << 13, "gpu": 1 << 16}
"""The widest block, by platform: its rows of unembed are held too, on a CPU in the cache."""
BLOCK_ELEMENTS = 1 << 26
"""Elements of unembed in a block at most: under a mask their gradients are held in float32, 256 MiB."""
TILE_ROWS = {"cpu": 128, "tpu": 1024, "TPU v6 lite": 2048, "gpu": 1024}
"""Tokens of a tile at least, where masked ones are skipped, by chip or platform: fewer would starve the products."""
MOST_TILES = 16
"""Into how many tiles tokens are cut at most, where masked ones are skipped: half of one is computed in vain."""


KERNEL_COPY = 256 << 20
"""Bytes of a block of unembed that is cast or gathered for a kernel."""

Kernel = Literal["pallas_tpu", "mosaic_gpu"]


class _Plan(NamedTuple):
    """What is fixed at trace time."""

    outputs: tuple[Output, ...]
    soft_cap: float | None
    block: int
    backward_block: int
    rows: int
    axis: str | None
    width_axis: str | None
    kernel: Kernel | None


def tiled(
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "V W"],
    targets: Int[Array, "N *K"],
    *,
    mask: Bool[Array, "N"] | None = None,
    bias: Float[Array, "V"] | None,
    temperature: Float[Array, ""] | None,
    soft_cap: float | None,
    outputs: tuple[Output, ...],
    block: int | None = None,
    rows: int | None = None,
    axis: str | None = None,
    width_axis: str | None = None,
    kernel: Kernel | None = None,
) -> TokenStats:
    """Statistics of N tokens, tile by tile.

    mask: tokens that are not kept are skipped, and what comes out for them means nothing. block: entries of the
    vocabulary at once; rows: tokens at once (None: by N, platform and whether there is a mask). axis: the mesh axis
    over which the vocabulary is split, inside `jax.shard_map`; unembed, bias are then this device's shard and targets
    count from its first entry. width_axis: the one over which the width of unembed is split (W is this device's part
    of D), as the tokens are: a block at a time is gathered, and its gradient scattered, so that no device ever holds
    [V, D]. kernel: the module of this package whose forward pass is taken.

    Numerics: operands keep the dtype of hidden (unembed is cast block by block), products accumulate in float32, and
    everything after is float32 (float64 under x64); the gradient of the logits is rounded to the dtype of hidden for
    the two products that consume it.
    """
    if kernel is not None and (what := beyond_kernels(targets, outputs)):
        raise ValueError(f"{kernel}: gives no {what}; use implementation='tiled'")
    num_tokens = hidden.shape[0]
    rows = min(rows or default_rows(num_tokens, masked=mask is not None), max(num_tokens, 1))
    width, vocab = hidden.shape[1], unembed.shape[0]
    forward = block or default_block(rows, width)
    backward = block or default_block(rows, width, WIDER.get(device_kind(), 1))
    plan = _Plan(outputs, soft_cap, min(forward, vocab), min(backward, vocab), rows, axis, width_axis, kernel)
    if mask is None:
        tiles = jax.tree.map(partial(in_tiles, rows=rows), (hidden, targets))
        return jax.tree.map(lambda x: x[:num_tokens], _run(plan, tiles, unembed, bias, temperature, None))
    kept = kept_first(mask)
    tiles = jax.tree.map(lambda x: in_tiles(kept.to_front(x), rows), (hidden, targets))
    stats = _run(plan, tiles, unembed, bias, temperature, kept.number)
    return jax.tree.map(lambda x: kept.put_back(x[:num_tokens]), stats)


def beyond_kernels(targets: Int[Array, "N *K"], outputs: tuple[Output, ...]) -> str | None:
    """What is asked for that the kernels do not give, or None."""
    lacking = sorted({"argmax", "log_sum_squares"}.intersection(outputs))
    return " and ".join(lacking) or ("several targets of a token" if targets.ndim > 1 else None)


def module_of(kernel: str) -> ModuleType:
    """The module of a kernel, with `sums` and `obstacle`; importing one costs more than all else of this package."""
    return importlib.import_module(f"jaxlm.ops.token_stats.{kernel}")


def _run(
    plan: _Plan, tokens: tuple[Array, Array], unembed: Array, bias: Array | None, temperature: Array | None,
    count: Array | None,
) -> TokenStats:  # fmt: skip
    hidden, targets = tokens
    head, targets, count = _vary_alike((Head(hidden, unembed, bias, temperature), targets, count))
    return _stats(plan, head, targets, count)


def default_block(rows: int, width: int, wider: int = 1) -> int:
    """Entries of a block of an unembed of that width, so that its tile suits the platform: a multiple of 128."""
    elements = wider * TILE_ELEMENTS.get(platform(), 1 << 20)
    suits = max(elements // max(rows, 1), LEAST_BLOCK.get(platform(), 512))
    most = min(MOST_BLOCK.get(platform(), 1 << 11), BLOCK_ELEMENTS // max(width, 1))
    return max(min(suits, most) // 128, 1) * 128


def default_rows(num_tokens: int, *, masked: bool) -> int:
    """Tokens of a tile: all of them, or, where masked ones are skipped, a sixteenth of them or the least.

    >>> default_rows(4096, masked=False), default_rows(4096, masked=True)
    (4096, 256)
    """
    if not masked:
        return num_tokens
    least = TILE_ROWS.get(device_kind()) or TILE_ROWS.get(platform(), 128)
    return max(least, -(-num_tokens // MOST_TILES))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(plan: _Plan, head: Head, targets: Int[Array, "N *K"], count: Int[Array, ""] | None) -> TokenStats:
    return _stats_fwd(plan, head, targets, count)[0]


def _stats_fwd(plan: _Plan, head: Head, targets: Array, count: Array | None) -> tuple[TokenStats, Any]:
    vocab = head.unembed.shape[0]
    sums = (_streamed if plan.kernel is None else _in_kernel)(plan, head, targets, count)
    known = in_vocabulary(targets, vocab)
    if plan.axis is not None:
        sums, known = over_shards(sums, known, plan.axis, vocab)
    stats, log_total, shift = finish(sums, known, plan.outputs)
    return stats, (head, targets, count, known, sums.maximum, log_total, shift)


def _streamed(plan: _Plan, head: Head, targets: Array, count: Array | None) -> Sums:
    step = partial(_accumulate, plan, head, targets, count)
    start = jax.tree.map(partial(_vary_as, head.hidden), empty_sums(head, targets, plan.outputs))
    return over_vocabulary(step, start, head.unembed.shape[0], plan.block)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _in_kernel(plan: _Plan, head: Head, targets: Array, count: Array | None) -> Sums:
    module = module_of(str(plan.kernel))
    options = dict(soft_cap=plan.soft_cap, entropy="entropy" in plan.outputs)

    @jax.custom_batching.sequential_vmap
    def sums(head: Head, targets: Array, count: Array | None) -> Sums:
        return module.sums(head, targets, count, **options)

    def part(start: Array | int, width: int) -> Sums:
        # Behind the last entry a tile has others, which are none of this block.
        entry = jnp.where(in_vocabulary(targets - start, width), targets - start, -1)
        return sums(head._replace(unembed=_block(plan, head, start, width)), entry, count)

    found = of_parts(part, head.unembed.shape[0], _kernel_block(plan, head))
    return found if "logprob" in plan.outputs else found._replace(target=None)


def _kernel_block(plan: _Plan, head: Head) -> int:
    """Entries of the vocabulary that a kernel is given at once: all, but where they have to be copied for it."""
    vocab = head.unembed.shape[0]
    if plan.width_axis is None and head.unembed.dtype == head.hidden.dtype:
        return vocab
    most = KERNEL_COPY // (head.hidden.shape[1] * head.hidden.dtype.itemsize) // 128 * 128
    return min(max(most, 128), vocab)


@_in_kernel.defjvp
def _in_kernel_jvp(plan: _Plan, primals: tuple, tangents: tuple) -> tuple[Sums, Sums]:
    """Met by second derivatives only: those of the streamed form."""
    head, targets, count = primals
    return jax.jvp(lambda head: _streamed(plan, head, targets, count), (head,), (tangents[0],))


def _accumulate(
    plan: _Plan, head: Head, targets: Array, count: Array | None, sums: Sums, start: Array | int, width: int
) -> Sums:
    """The sums of every token with a block of the vocabulary added."""
    unembed = _block(plan, head, start, width)
    bias = None if head.bias is None else take_rows(head.bias, start, width)

    def tile(t: Array | int) -> Head:
        return Head(_rows(head.hidden, plan, t), unembed, bias, head.temperature)

    def add(sums: Sums, block: Head, t: Array | int) -> Sums:
        before = jax.tree.map(lambda x: _rows(x, plan, t), sums)
        found = _more(plan, block, _rows(targets, plan, t) - start, before, start)
        return jax.tree.map(lambda whole, part: _put(whole, part, plan, t), sums, found)

    return over_tiles(tile, add, sums, num_tiles=len(targets) // plan.rows, rows=plan.rows, count=count)


def _block(plan: _Plan, head: Head, start: Array | int, width: int) -> Float[Array, "C D"]:
    """Rows of unembed in the dtype of hidden, whole."""
    rows = unembed_rows(head, start, width)
    return rows if plan.width_axis is None else jax.lax.all_gather(rows, plan.width_axis, axis=1, tiled=True)


def _more(plan: _Plan, head: Head, targets: Array, sums: Sums, start: Array | int) -> Sums:
    """The sums of a tile with its block of the vocabulary added, whose first entry is `start`."""
    z = activate(project(head, 0, head.unembed.shape[0]), head, plan.soft_cap)
    return with_block(sums, z, targets, start)


def _rows(x: Array, plan: _Plan, t: Array | int) -> Array:
    """Those of tile t."""
    return take_rows(x, t * plan.rows, plan.rows)


def _put(whole: Array, part: Array, plan: _Plan, t: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, t * plan.rows, axis=0)


def _stats_bwd(plan: _Plan, residuals: Any, cotangents: TokenStats) -> tuple[Head, None, None]:
    head, targets, count, known, maximum, log_total, shift = residuals
    zeros = jnp.zeros_like(log_total)
    g = jnp.zeros_like(known, zeros.dtype) if cotangents.logprob is None else jnp.where(known, cotangents.logprob, 0)
    s = zeros if cotangents.logsumexp is None else cotangents.logsumexp
    row = Row(maximum, log_total, shift, g, s - (g if g.ndim == 1 else g.sum(axis=1)), cotangents.entropy)
    zero = partial(_zeros, like=head.hidden)
    carry = Gradient(
        hidden=zero(head.hidden.shape, wide_dtype(head)),
        unembed=_unset(head.unembed.shape, head.unembed.dtype, like=head.hidden),
        bias=None if head.bias is None else zero(head.bias.shape, head.bias.dtype),
    )
    step = partial(_backpropagate, plan, head, targets, row, count)
    grad = over_vocabulary(step, carry, head.unembed.shape[0], plan.backward_block)
    temperature = None if head.temperature is None else jnp.zeros_like(head.temperature)
    return Head(grad.hidden.astype(head.hidden.dtype), grad.unembed, grad.bias, temperature), None, None


_stats.defvjp(_stats_fwd, _stats_bwd)


def _backpropagate(
    plan: _Plan, head: Head, targets: Array, row: Row, count: Array | None, grad: Gradient, start: Array | int,
    width: int,
) -> Gradient:  # fmt: skip
    """The gradients with those of a block of the vocabulary: added for hidden, written for unembed and bias."""
    block = _block(plan, head, start, width)
    bias = None if head.bias is None else take_rows(head.bias, start, width)
    wide = wide_dtype(head)
    num_tiles = len(targets) // plan.rows

    def tile(t: Array | int) -> Gradient:
        part = Head(_rows(head.hidden, plan, t), block, bias, head.temperature)
        of = jax.tree.map(lambda x: _rows(x, plan, t), row)
        return _of_tile(plan, part, _rows(targets, plan, t) - start, of)

    def add(grad: Gradient, new: Gradient, t: Array | int) -> Gradient:
        if num_tiles == 1:
            return Gradient(grad.hidden + new.hidden, new.unembed, new.bias)
        return Gradient(
            hidden=_put(grad.hidden, _rows(grad.hidden, plan, t) + new.hidden, plan, t),
            unembed=_set_if(t > 0, grad.unembed) + new.unembed,
            bias=None if new.bias is None else _set_if(t > 0, grad.bias) + new.bias,
        )

    none = partial(_unset, like=head.hidden)
    of_block = Gradient(grad.hidden, none(block.shape, wide), None if bias is None else none(bias.shape, wide))
    new = over_tiles(tile, add, of_block, num_tiles=num_tiles, rows=plan.rows, count=count)
    any_tile = True if count is None else count > 0
    of_rows, of_bias = _set_if(any_tile, new.unembed), _set_if(any_tile, new.bias)
    if plan.width_axis is not None:  # the sum over its devices' tokens, of this device's columns
        of_rows = jax.lax.psum_scatter(of_rows, plan.width_axis, scatter_dimension=1, tiled=True)
    return Gradient(
        hidden=new.hidden,
        unembed=_write(grad.unembed, of_rows, start),
        bias=None if grad.bias is None else _write(grad.bias, of_bias, start),
    )


def _of_tile(plan: _Plan, head: Head, targets: Array, row: Row) -> Gradient:
    """The gradients of a tile of tokens and its block of the vocabulary, in float32."""
    return block_gradient(row, project(head, 0, head.unembed.shape[0]), head, targets, plan.soft_cap)


def over_vocabulary(step: Callable[..., Any], carry: Any, vocab: int, block: int) -> Any:
    """Carries `step(carry, start, width)` over all blocks; the ragged last one is narrower, never padded."""
    # Under a second differentiation a block is recomputed; in the first it makes no difference.
    step = jax.checkpoint(step, static_argnums=(2,))
    whole = vocab // block
    carry, _ = jax.lax.scan(lambda c, i: (step(c, i * block, block), None), carry, jnp.arange(whole))
    return step(carry, whole * block, vocab % block) if vocab % block else carry


def _write(x: Array, block: Array, start: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, axis=0)


def _vary_alike(tree: Any) -> Any:
    """Inside shard_map: every operand varies over the union of the axes, so that JAX sums the gradients over them."""
    union = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _vary(x, union), tree)


def _vary(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _vary_as(like: Array, x: Array) -> Array:
    return _vary(x, jax.typeof(like).mat.varying)


def _unset(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """What is written before it is read: to fill it with zeros takes a TPU 4 to 12 % of the backward pass."""
    return _vary_as(like, jax.lax.empty(shape, dtype)) if platform() == "tpu" else _zeros(shape, dtype, like)


def _set_if(condition: Array | bool, x: Array | None) -> Array | None:
    """What `_unset` made, if it has been written by now; else zeros, which it holds where this is no TPU."""
    certain = condition is True or platform() != "tpu"
    return x if x is None or certain else jnp.where(condition, x, 0)


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    return _vary_as(like, jnp.zeros(shape, dtype))
