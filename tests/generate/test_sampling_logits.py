"""Truncations and the draw, against brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate.logits import draw, min_p, top_k, top_p, truncate


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(size=(5, 17)) * 2, jnp.float32)


def kept(x):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(x)]


def test_top_k_keeps_the_k_largest(logits):
    order = np.argsort(-np.asarray(logits), axis=-1)
    assert kept(top_k(logits, 3)) == [set(row[:3]) for row in order]
    np.testing.assert_array_equal(top_k(logits, 99), logits)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    expected = []
    for row in np.asarray(logits, np.float64):
        probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order, mass, chosen = np.argsort(-row), 0.0, set()
        for token in order:
            if chosen and mass >= p - 1e-6:
                break
            chosen.add(token)
            mass += probability[token]
        expected.append(chosen)
    assert kept(top_p(logits, p)) == expected


def test_min_p_is_relative_to_the_most_probable(logits):
    probability = np.asarray(jax.nn.softmax(logits))
    assert kept(min_p(logits, 0.2)) == [set(np.flatnonzero(r >= 0.2 * r.max())) for r in probability]


def test_truncations_compose_in_order(logits):
    by_hand = min_p(top_p(top_k(logits, 8), 0.8), 0.1)
    np.testing.assert_array_equal(truncate(logits, k=8, p=0.8, minimum=0.1), by_hand)
    np.testing.assert_array_equal(truncate(logits), logits)


def test_draw_follows_the_distribution_and_each_rows_own_key():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = draw(keys, jnp.broadcast_to(logits, (20_000, 3)))
    share = np.bincount(tokens, minlength=3) / 20_000
    # Four standard deviations of a binomial share.
    np.testing.assert_allclose(share, [0.1, 0.2, 0.7], atol=4 * np.sqrt(0.25 / 20_000))
    np.testing.assert_array_equal(draw(keys[5:9], jnp.broadcast_to(logits, (4, 3))), tokens[5:9])


def test_a_removed_token_is_never_drawn(logits):
    keys = jax.random.split(jax.random.key(1), 500)
    tokens = draw(keys, jnp.broadcast_to(top_k(logits, 2)[0], (500, 17)))
    assert set(np.asarray(tokens)) == kept(top_k(logits, 2))[0]
