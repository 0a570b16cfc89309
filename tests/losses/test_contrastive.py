"""Contrastive losses: closed forms, masks, degenerate vectors, gradients, and the same numbers on eight devices."""

from __future__ import annotations

from functools import partial
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxlm import losses

B, E = 8, 6


def vectors(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_alike_keys_give_log_n_and_orthogonal_ones_the_closed_form():
    np.testing.assert_allclose(losses.info_nce(vectors(B, E), jnp.ones((B, E)), temperature=0.05), log(B), rtol=1e-6)
    found = losses.info_nce(jnp.eye(4), jnp.eye(4), temperature=0.5)
    np.testing.assert_allclose(found, log(1 + 3 * exp(-2)), rtol=1e-6)


def test_vectors_of_any_length_give_the_same():
    query, key = vectors(B, E), vectors(B, E, seed=1)
    want = losses.info_nce(query, key, temperature=0.05)
    np.testing.assert_allclose(losses.info_nce(1e-25 * query, 1e25 * key, temperature=0.05), want, rtol=1e-5)


def test_a_positive_may_stand_anywhere():
    query, key = vectors(B, E), vectors(B, E, seed=1)
    order = np.random.default_rng(2).permutation(B)
    moved = losses.info_nce(query, key[order], temperature=0.1, positive=jnp.argsort(jnp.asarray(order)))
    np.testing.assert_allclose(moved, losses.info_nce(query, key, temperature=0.1), rtol=1e-5)


def test_a_masked_duplicate_changes_nothing():
    """Row 0 twice: with the copies masked each is as if the other were absent, and its gradient too."""
    query, key = vectors(B, E), vectors(B, E, seed=1)
    twice = jnp.concatenate([query, query[:1]]), jnp.concatenate([key, key[:1]])
    ids = jnp.asarray([*range(B), 0])

    def loss(query, key, ids):
        return losses.info_nce(query, key, temperature=0.1, negative_mask=losses.distinct(ids, ids))

    np.testing.assert_allclose(loss(*twice, ids)[0], losses.info_nce(query, key, temperature=0.1)[0], rtol=1e-6)
    grad = jax.grad(lambda key: loss(twice[0], key, ids)[0])(twice[1])
    np.testing.assert_array_equal(grad[-1], 0)
    np.testing.assert_allclose(
        grad[:-1], jax.grad(lambda k: losses.info_nce(query, k, temperature=0.1)[0])(key), atol=1e-6
    )


def test_nothing_but_the_positive_left_gives_zero():
    mask = jnp.zeros((B, B), bool)
    found = losses.info_nce(vectors(B, E), vectors(B, E, seed=1), temperature=0.05, negative_mask=mask)
    np.testing.assert_array_equal(found, 0)


def test_the_weight_of_hard_negatives_is_the_papers():
    query, positive, hard = (np.asarray(vectors(B, E, seed=i), np.float64) for i in range(3))
    s = [np.asarray(losses.cosines(query, k), np.float64) / 0.5 for k in (positive, hard)]
    alpha = np.where(np.eye(B, dtype=bool), 3.0, 1.0)
    want = -np.log(np.exp(np.diag(s[0])) / (np.exp(s[0]).sum(1) + (alpha * np.exp(s[1])).sum(1)))
    found = losses.simcse(query, positive, hard, temperature=0.5, hard_negative_weight=3.0)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_zero_and_equal_vectors_have_finite_gradients():
    zeros = jnp.zeros((B, E))
    for loss in (
        lambda x, y: losses.info_nce(x, y, temperature=0.001).sum(),
        lambda x, y: losses.alignment(x, y).sum() + losses.uniformity(x) + losses.uniformity(y),
        lambda x, y: losses.cosent(x, y, jnp.arange(B)) + losses.angle(x, y, jnp.arange(B)),
        lambda x, y: losses.cosine_mse(x, y, jnp.ones(B)).sum(),
    ):
        for x, y in ((zeros, zeros), (vectors(B, E), vectors(B, E)), (zeros, vectors(B, E))):
            value, grads = jax.value_and_grad(loss, argnums=(0, 1))(x, y)
            assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


@pytest.mark.slow
def test_gradients_are_numerical_derivatives():
    x, y, n = (vectors(4, 4, seed=i) for i in range(3))
    mask = jnp.asarray(np.random.default_rng(5).random((4, 8)) > 0.3)
    check_grads(partial(losses.simcse, temperature=0.5, hard_negative_weight=2.0, negative_mask=mask), (x, y, n), 1,
                modes=["rev"], atol=2e-2, rtol=2e-2)  # fmt: skip
    check_grads(losses.uniformity, (x,), 1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_uniformity_and_alignment_of_known_sets():
    circle = jnp.asarray([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    np.testing.assert_allclose(losses.uniformity(circle), log((4 * exp(-4) + 2 * exp(-8)) / 6), rtol=1e-6)
    np.testing.assert_allclose(losses.uniformity(jnp.ones((3, 2))), 0, atol=1e-6)
    np.testing.assert_allclose(losses.alignment(circle, -5 * circle), 4, rtol=1e-6)


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_eight_devices_give_the_numbers_of_one(negatives):
    """The negatives are the whole batch's, with gradients through every shard."""
    arrays = [vectors(16, E, seed=i) for i in range(2)] + ([vectors(16, negatives, E, seed=9)] if negatives else [])

    def total(arrays):
        return jnp.mean(losses.simcse(*arrays))

    rows = NamedSharding(Mesh(np.asarray(jax.devices()[:8]), ("data",)), PartitionSpec("data"))
    step = jax.jit(jax.value_and_grad(total))
    one, eight = step(arrays), step(jax.device_put(arrays, rows))
    assert len(eight[1][0].sharding.device_set) == 8
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    for a, b in zip(eight[1], one[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_equal_scores_are_not_compared():
    x, y = vectors(B, E), vectors(B, E, seed=1)
    np.testing.assert_allclose(losses.cosent(x, y, jnp.ones(B)), 0, atol=1e-6)
    score = jnp.arange(B) // 2
    np.testing.assert_allclose(losses.cosent(x, y, score), losses.cosent(x, y, 10.0 * score), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: losses.info_nce(x, x, temperature=0.0), "temperature positive, found 0.0; 0.05 is SimCSE's"),
        (lambda x: losses.info_nce(x, x[:3], temperature=1.0), "a key for each of the 8 queries, found 3"),
        (lambda x: losses.info_nce(x, x[:, :3], temperature=1.0), "of one width, found"),
        (lambda x: losses.info_nce(x, x, temperature=1.0, negative_mask=jnp.ones((8, 3), bool)), "negative_mask"),
        (lambda x: losses.symmetric_info_nce(x, x[:3], temperature=1.0), "two sides of one shape"),
        (lambda x: losses.simcse(x, x[:3]), "a positive for every query"),
        (lambda x: losses.simcse(x, x, x, hard_negative_weight=0.0), "hard_negative_weight positive, found 0.0"),
        (lambda x: losses.uniformity(x[:1]), "at least 2, found 1"),
        (lambda x: losses.angle_similarity(x[:, :3], x[:, :3]), "one even width"),
        (lambda x: losses.cosent(x, x, jnp.ones((8, 1))), "of one shape"),
        (lambda x: losses.matryoshka(losses.info_nce, dims=()), "a weight for each"),
        (lambda x: losses.matryoshka(losses.info_nce, dims=(9,))(x, x, temperature=1.0), "at least 9"),
        (lambda x: losses.guided_negatives(jnp.ones((8, 8)), jnp.ones(8), margin=-1.0), "margin at least 0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors(B, E))
