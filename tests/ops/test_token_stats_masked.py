"""Masked tokens are skipped: the numbers are those of the oracle, and the tiles that run are those that are needed."""

from __future__ import annotations

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.token_stats import one_pass, one_pass_nll, token_stats
from jaxlm.ops.token_stats.compact import kept_first
from jaxlm.ops.token_stats.dense import dense

module = importlib.import_module("jaxlm.ops.token_stats.tiled")  # the package has the function by that name
N, D, V = 23, 8, 31
OPTIONS = dict(temperature=jnp.float32(0.8), soft_cap=3.0, outputs=("logprob", "entropy", "logsumexp"))
MASKS = {
    "none": np.zeros(N, bool),
    "one": np.arange(N) == 17,
    "half": np.random.default_rng(0).permutation(N) % 2 == 0,
    "all but one": np.arange(N) != 3,
    "all": np.ones(N, bool),
}
FAST = ("none", "half")
masks = pytest.mark.parametrize(
    "mask",
    [pytest.param(mask, id=name, marks=() if name in FAST else pytest.mark.slow) for name, mask in MASKS.items()],
)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, unembed = jax.random.normal(keys[0], (N, D)), jax.random.normal(keys[1], (V, D))
    return hidden, unembed, jax.random.normal(keys[2], (V,)), jax.random.randint(keys[3], (N,), 0, V)


def skipping(mask, hidden, unembed, bias, targets):
    return module.tiled(hidden, unembed, targets, mask=mask, bias=bias, rows=4, block=7, **OPTIONS)


def weighted(stats, mask):
    """A scalar of the kept tokens, each output with a weight of its own."""
    weights = np.random.default_rng(1).normal(size=(3, N))
    return sum(jnp.sum(jnp.where(mask, w * x, 0)) for w, x in zip(weights, stats))


@masks
def test_values_and_gradients_are_the_oracles(arrays, mask):
    *operands, targets = arrays

    @partial(jax.jit, static_argnums=0)
    def run(kind, mask, *operands):
        def total(*operands):
            hidden, unembed, bias = operands
            if kind == "tiled":
                return weighted(skipping(mask, *operands, targets), mask)
            return weighted(dense(hidden, unembed, targets, bias=bias, **OPTIONS), mask)

        return jax.value_and_grad(total, (0, 1, 2))(*operands)

    got, want = (run(kind, mask, *operands) for kind in ("tiled", "dense"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_it_can_be_mapped_and_differentiated_twice(arrays):
    *operands, targets = arrays
    mask = jnp.stack([jnp.asarray(MASKS["half"]), jnp.asarray(MASKS["one"])])

    def second(stats, hidden):
        def slope(h):
            return jnp.sum(jnp.sin(jax.grad(lambda h: weighted(stats(h), mask[0]))(h)))

        return jax.jit(jax.grad(slope))(hidden)

    got = second(lambda h: skipping(mask[0], h, *operands[1:], targets), operands[0])
    want = second(lambda h: dense(h, operands[1], targets, bias=operands[2], **OPTIONS), operands[0])
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    mapped = jax.vmap(lambda m: skipping(m, *operands, targets))(mask)
    for i in range(2):
        alone = skipping(mask[i], *operands, targets)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i][mask[i]], b[mask[i]], rtol=1e-6, atol=1e-6)


@masks
def test_only_tiles_with_tokens_that_count_are_computed(arrays, mask, monkeypatch):
    *operands, targets = arrays
    calls = {"forward": 0, "backward": 0}

    def counted(function, direction):
        def run(plan, head, *rest):
            jax.debug.callback(lambda: calls.__setitem__(direction, calls[direction] + 1))
            return function(plan, head, *rest)

        return run

    monkeypatch.setattr(module, "_more", counted(module._more, "forward"))
    monkeypatch.setattr(module, "_of_tile", counted(module._of_tile, "backward"))
    grad = jax.jit(jax.grad(lambda h, mask: weighted(skipping(mask, h, *operands[1:], targets), mask)))
    jax.block_until_ready(grad(operands[0], mask))
    jax.effects_barrier()
    blocks, needed = -(-V // 7), -(-int(mask.sum()) // 4)
    assert calls == {"forward": blocks * needed, "backward": blocks * needed}


@masks
def test_one_pass_stops_behind_the_last_token_that_counts(arrays, mask, monkeypatch):
    hidden, unembed, _, targets = arrays
    monkeypatch.setattr(one_pass, "num_tiles", lambda n, v: 6)
    calls = []
    one_tile = one_pass._one_tile

    def counted(*arguments):
        jax.debug.callback(lambda: calls.append(1))
        return one_tile(*arguments)

    monkeypatch.setattr(one_pass, "_one_tile", counted)
    grad = jax.jit(jax.grad(lambda h, mask: one_pass_nll(h, unembed, targets, mask=mask)[0]))
    got = grad(hidden, mask)
    jax.effects_barrier()
    assert len(calls) == -(-int(mask.sum()) // 4)
    assert not np.asarray(got)[~mask].any() and np.isfinite(got).all()


def test_kept_tokens_stand_first_in_their_order():
    mask = MASKS["half"]
    kept = kept_first(jnp.asarray(mask))
    places = np.arange(N)
    assert np.asarray(kept.order).tolist() == [*places[mask], *places[~mask]] and int(kept.number) == mask.sum()
    x = jax.random.normal(jax.random.key(0), (N, 2))
    np.testing.assert_array_equal(kept.put_back(kept.to_front(x)), x)
    weights = np.arange(2.0 * N).reshape(N, 2).astype(np.float32)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(kept.to_front(x) * weights))(x)[kept.order], weights)


def test_the_gradient_moves_rows_back_without_a_scatter(arrays):
    hidden, unembed, _, targets = arrays
    mask = jnp.arange(N) % 2 == 0

    def total(h):
        return token_stats(h, unembed, targets, mask=mask, implementation="tiled").logprob.sum()

    scatters = str(jax.make_jaxpr(jax.grad(total))(hidden)).count("scatter")
    assert scatters == str(jax.make_jaxpr(total)(hidden)).count("scatter")
