"""The summed next-token loss with its gradient made in the forward pass: 6NDV operations instead of 8NDV.

`tiled` must recompute the logits, since it learns only in the backward pass what its outputs are used for. Where the
loss is known, tile by tile of tokens: the products with each block of the vocabulary, which are held, and the running
sums; then, block by block again, the gradient of the logits, and the two products that consume it. The backward pass
only scales. With weights w (the mask) and c = z_weight:

    total = sum_t w_t (-logprob_t + c logsumexp_t^2)        dz = w (p (1 + 2 c logsumexp) - [target])
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.platform import platform
from jaxlm.ops.token_stats.compact import kept_first
from jaxlm.ops.token_stats.contract import (
    Output,
    TokenStats,
    blank,
    check_options,
    check_outputs,
    check_shapes,
    silence,
)
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
    wide_dtype,
    with_block,
)
from jaxlm.ops.token_stats.tiled import tiled
from jaxlm.typing import Array, Bool, Float, Int

TILE_ELEMENTS = {"cpu": 1 << 25, "tpu": 1 << 23, "gpu": 1 << 27}
"""Logits held at once, by platform: few enough to stay small, and enough tokens for products at full speed."""
MOST_ROWS = {"cpu": 1 << 9}
"""Tokens of a tile at most, by platform: with a small vocabulary its logits stay in the cache."""
MOST_BLOCK = {"cpu": 1 << 11}
"""The widest block, by platform: with a large vocabulary this is what stays there. Elsewhere the whole vocabulary."""


class _Plan(NamedTuple):
    """What is fixed at trace time."""

    outputs: tuple[Output, ...]
    soft_cap: float | None
    z_weight: float
    num_tiles: int
    block: int


def one_pass_nll(
    hidden: Float[Array, "*tokens D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    bias: Float[Array, "V"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    z_weight: float = 0.0,
    outputs: Collection[Output] = ("logprob", "entropy"),
) -> tuple[Float[Array, ""], TokenStats]:
    """The sum of the next-token loss over the mask, and the statistics of each token on the side, without a gradient.

        total = sum_t mask_t (-logprob_t + z_weight logsumexp_t^2)

    Arguments as in `token_stats`; z_weight: at least 0. Result: (total, TokenStats): nats, float32; only total is
    differentiable, in hidden, unembed and bias, in reverse mode and once. Numerics as in `token_stats`, to the order of
    summation; the gradient of unembed is accumulated in float32. Not differentiated, it costs what `token_stats` does;
    differentiated it holds that gradient, [V, D], from the forward pass on. On one device: over a mesh use
    `token_stats_sharded`.

    Source: the gradient in the forward pass, Hsu et al. 2024, arXiv:2410.10989, section 3.2, which chunks likewise.

    >>> import jax, jax.numpy as jnp
    >>> def loss(unembed):
    ...     return one_pass_nll(jnp.ones((2, 3)), unembed, jnp.array([0, 3]))[0]
    >>> total, grad = jax.value_and_grad(loss)(jnp.zeros((4, 3)))
    >>> print(f"{total:.3f}", grad[:, 0])
    2.773 [-0.5  0.5  0.5 -0.5]
    """
    targets = jnp.asarray(targets)
    check_shapes(hidden, unembed, targets, mask=mask, bias=bias)
    num_tokens, vocab = targets.size, unembed.shape[0]
    options = check_options(
        unembed, bias=bias, temperature=temperature, soft_cap=soft_cap, logit_scale=logit_scale, valid_vocab=valid_vocab
    )
    block = min(MOST_BLOCK.get(platform(), vocab), vocab)
    plan = _Plan(check_outputs(outputs), options.soft_cap, float(z_weight), num_tiles(num_tokens, vocab), block)
    hidden, flat, count = blank(hidden, mask).reshape(-1, hidden.shape[-1]), targets.reshape(-1), jnp.int32(num_tokens)
    kept = None if mask is None else kept_first(mask.reshape(-1))
    if kept is not None:
        hidden, flat, count = kept.to_front(hidden), kept.to_front(flat), kept.number
    total, stats = _nll(plan, Head(hidden, unembed, options.bias, options.temperature), flat, count)
    if kept is not None:
        stats = jax.tree.map(kept.put_back, stats)
    return total, silence(jax.tree.map(lambda x: jax.lax.stop_gradient(x).reshape(targets.shape), stats), mask)


def num_tiles(num_tokens: int, vocab: int) -> int:
    """Into how many tiles the tokens are cut: of at most TILE_ELEMENTS logits and MOST_ROWS, but of 64 tokens at least.

    >>> num_tiles(2048, 32_000), num_tiles(100, 8)
    (4, 1)
    """
    rows = max(TILE_ELEMENTS.get(platform(), 1 << 23) // vocab, 64)
    return -(-num_tokens // min(rows, MOST_ROWS.get(platform(), rows))) or 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(plan: _Plan, head: Head, targets: Int[Array, "N"], count: Int[Array, ""]) -> tuple[Array, TokenStats]:
    """Of the first `count` tokens; those behind them are not looked at."""
    options = dict(bias=head.bias, temperature=head.temperature, soft_cap=plan.soft_cap, outputs=_needed(plan))
    mask = jnp.arange(len(targets)) < count
    return _total(plan, tiled(head.hidden, head.unembed, targets, mask=mask, **options), mask)


class _Carry(NamedTuple):
    """What the tiles write: the gradients, that of hidden in tiles, and the statistics of each token."""

    gradient: Gradient
    stats: TokenStats


def _nll_fwd(plan: _Plan, head: Head, targets: Array, count: Array) -> tuple[tuple[Array, TokenStats], Head]:
    num_tokens, wide = len(targets), wide_dtype(head)
    mask = jnp.arange(num_tokens) < count
    cast = head._replace(unembed=head.unembed.astype(head.hidden.dtype))
    tiles = jax.tree.map(partial(_cut, num_tiles=plan.num_tiles), (head.hidden, targets, mask))
    zeros = partial(jnp.zeros, dtype=wide)
    start = _Carry(
        gradient=Gradient(
            hidden=jnp.zeros_like(tiles[0]),
            unembed=zeros(head.unembed.shape),
            bias=None if head.bias is None else zeros(head.bias.shape),
        ),
        stats=TokenStats(
            **{name: zeros(tiles[1].shape, dtype=jnp.int32 if name == "argmax" else wide) for name in _needed(plan)}
        ),
    )

    def step(t: Array, carry: _Carry) -> _Carry:
        return _one_tile(plan, cast, carry, t, jax.tree.map(lambda x: x[t], tiles))

    # Tiles behind the last token that counts are not run.
    end = jax.lax.fori_loop(0, -(-count // tiles[1].shape[1]), step, start)
    found = (end.gradient.hidden, end.stats)
    hidden, stats = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], found)
    bias = None if head.bias is None else end.gradient.bias.astype(head.bias.dtype)
    temperature = None if head.temperature is None else jnp.zeros_like(head.temperature)
    gradient = Head(hidden, end.gradient.unembed.astype(head.unembed.dtype), bias, temperature)
    return _total(plan, stats, mask), gradient


def _nll_bwd(plan: _Plan, gradient: Head, cotangents: tuple[Array, TokenStats]) -> tuple[Head, None, None]:
    return jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradient), None, None


_nll.defvjp(_nll_fwd, _nll_bwd)


def _needed(plan: _Plan) -> tuple[Output, ...]:
    extra: tuple[Output, ...] = ("logprob", "logsumexp") if plan.z_weight else ("logprob",)
    return check_outputs({*plan.outputs, *extra})


def _total(plan: _Plan, stats: TokenStats, mask: Bool[Array, "N"]) -> tuple[Float[Array, ""], TokenStats]:
    loss = -stats.logprob
    if plan.z_weight:
        loss = loss + plan.z_weight * jnp.square(stats.logsumexp)
    asked = {name: value for name, value in stats._asdict().items() if name in plan.outputs}
    return jnp.sum(jnp.where(mask, loss, 0)), TokenStats(**asked)


def _cut(x: Array, *, num_tiles: int) -> Array:
    """Tokens in tiles of equal size; the last one is filled up with zeros, which the mask (False) leaves out."""
    size = -(-x.shape[0] // num_tiles)
    padded = jnp.pad(x, [(0, num_tiles * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(num_tiles, size, *x.shape[1:])


def _one_tile(plan: _Plan, head: Head, carry: _Carry, t: Array, tile: tuple[Array, Array, Array]) -> _Carry:
    """Adds a tile's part to the gradients of unembed and bias; puts its gradient of hidden and its statistics."""
    hidden, targets, mask = tile
    head, known = head._replace(hidden=hidden), in_vocabulary(targets, head.unembed.shape[0])
    sums, products = _forward(plan, head, targets)
    stats, log_total, shift = finish(sums, known, _needed(plan))
    weight = mask.astype(log_total.dtype)
    g = jnp.where(known, -weight, 0)
    s = 2 * plan.z_weight * stats.logsumexp * weight if plan.z_weight else 0
    row = Row(sums.maximum, log_total, shift, g, s - g, None)
    before = carry.gradient._replace(hidden=jnp.zeros(hidden.shape, log_total.dtype))
    gradient = _backward(plan, head, targets, row, products, before)
    return _Carry(
        gradient._replace(hidden=carry.gradient.hidden.at[t].set(gradient.hidden.astype(hidden.dtype))),
        jax.tree.map(lambda whole, part: whole.at[t].set(part), carry.stats, stats),
    )


def _blocks(plan: _Plan, vocab: int) -> list[tuple[Int[Array, "B"], int]]:
    """Where blocks of the vocabulary start, and their width: the whole ones, and the ragged last one, never padded."""
    end = vocab // plan.block * plan.block
    whole = [(jnp.arange(0, end, plan.block), plan.block)]
    return [*whole, (jnp.array([end]), vocab - end)] if vocab > end else whole


def _forward(plan: _Plan, head: Head, targets: Int[Array, "N"]) -> tuple[Sums, list[Float[Array, "B N C"]]]:
    """The sums of a tile over the whole vocabulary, and its products with the blocks of each width."""

    def step(sums: Sums, start: Array, width: int) -> tuple[Sums, Array]:
        u = project(head, start, width)
        return with_block(sums, activate(u, head, plan.soft_cap), targets - start, start), u

    sums, products = empty_sums(head, targets, _needed(plan)), []
    for starts, width in _blocks(plan, head.unembed.shape[0]):
        sums, u = _scan(partial(step, width=width), sums, starts)
        products.append(u)
    return sums, products


def _backward(
    plan: _Plan, head: Head, targets: Int[Array, "N"], row: Row, products: list[Float[Array, "B N C"]], grad: Gradient
) -> Gradient:
    """The gradients with those of a tile added."""

    def step(grad: Gradient, block: tuple[Array, Array], width: int) -> tuple[Gradient, None]:
        start, u = block
        bias = None if head.bias is None else take_rows(head.bias, start, width)
        part = head._replace(unembed=take_rows(head.unembed, start, width), bias=bias)
        new = block_gradient(row, u, part, targets - start, plan.soft_cap)
        return Gradient(
            hidden=grad.hidden + new.hidden,
            unembed=_add_rows(grad.unembed, new.unembed, start),
            bias=None if grad.bias is None else _add_rows(grad.bias, new.bias, start),
        ), None

    for (starts, width), u in zip(_blocks(plan, head.unembed.shape[0]), products):
        grad, _ = _scan(partial(step, width=width), grad, (starts, u))
    return grad


def _add_rows(whole: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, take_rows(whole, start, len(part)) + part, start, axis=0)


def _scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, but without a loop around a single step, which would copy what it holds."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return jax.lax.scan(step, carry, xs)
    carry, y = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], y)
