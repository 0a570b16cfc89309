"""What token_stats costs, read from the compiled program: no [N, V] buffer, no product that nobody asked for."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxlm.ops.token_stats import token_stats
from jaxlm.ops.token_stats.tiled import TILE_ELEMENTS

N, D, V = 96, 32, 8192 + 7


def arguments(dtype=jnp.float32, vocab=V):
    shapes = ((N, D), dtype), ((vocab, D), jnp.float32), ((N,), jnp.int32)
    return [jax.ShapeDtypeStruct(*x) for x in shapes]


def loss(hidden, unembed, targets, outputs=("logprob", "entropy"), implementation="tiled"):
    stats = token_stats(hidden, unembed, targets, outputs=outputs, implementation=implementation)
    return sum(x.sum() for x in jax.tree.leaves(stats))


def compile_for(f, dtype=jnp.float32, vocab=V):
    return jax.jit(f).lower(*arguments(dtype, vocab)).compile()


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    """Blocks of 512 at this small N, so that the vocabulary has 16 whole ones and a ragged one."""
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 512 * N)


def largest_buffer(text):
    """Elements of the largest array in the program."""
    shapes = re.findall(r"(?:f32|f64|bf16|s32|pred)\[([\d,]+)\]", text)
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_no_array_of_tokens_by_vocabulary(dtype):
    for f in (loss, jax.grad(loss, (0, 1))):
        compiled = compile_for(f, dtype)
        assert largest_buffer(compiled.as_text()) == V * D  # unembed and its gradient
        tile = 4 * 512 * N
        # Tiles, blocks of unembed and the gradient of hidden; the copies that XLA makes of a tile are few.
        assert compiled.memory_analysis().temp_size_in_bytes < 5 * tile + 4 * (4 * 512 * D) + 4 * 4 * N * D
    dense = compile_for(partial(loss, implementation="dense"), dtype)
    assert largest_buffer(dense.as_text()) == N * V


def test_second_derivatives_hold_no_array_of_tokens_by_vocabulary():
    def penalty(*a):
        return jnp.square(jax.grad(loss)(*a)).sum()

    assert largest_buffer(compile_for(jax.grad(penalty)).as_text()) < N * V


def num_products(f):
    """Matrix products in the compiled program; those in a loop over whole blocks count once."""
    return len(re.findall(r" dot\(", compile_for(f, vocab=8192).as_text()))


def test_a_frozen_unembedding_costs_no_product():
    # Per block: one forward; backward one to recompute, and one for each gradient.
    assert num_products(loss) == 1
    assert num_products(jax.grad(loss, (0, 1))) == 4
    assert num_products(jax.grad(loss, 0)) == 3
    assert num_products(jax.grad(loss, 1)) == 3


def test_what_is_not_asked_for_is_not_computed():
    flops = [
        compile_for(partial(loss, outputs=outputs)).cost_analysis()["flops"]
        for outputs in (("logsumexp",), ("logprob",), ("logprob", "entropy"))
    ]
    tile = N * 512  # XLA counts the body of a loop once
    assert flops[0] < flops[1] < flops[0] + tile
    assert flops[2] > flops[1] + 2 * tile


def test_one_compilation_for_all_batches():
    count = 0

    @jax.jit
    def step(hidden, unembed, targets, temperature):
        nonlocal count
        count += 1
        return token_stats(hidden, unembed, targets, temperature=temperature)

    for seed in range(3):
        key = jax.random.key(seed)
        targets = jax.random.randint(key, (4,), 0, 50)
        step(jax.random.normal(key, (4, 8)), jnp.ones((50, 8)), targets, jnp.float32(1 + seed))
    assert count == 1
