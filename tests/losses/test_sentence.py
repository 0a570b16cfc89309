"""Losses in the space of sentences: their formulas in float64, what masked places do, gradients, and devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.losses import latent_cosine, latent_info_nce, latent_squared_error, next_sentence_nll, termination
from jaxlm.sharding.mesh import MeshConfig, make_mesh

B, M, Z = 4, 3, 8
PAIRS = (latent_info_nce, latent_cosine, latent_squared_error)


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    return rng.normal(size=(B, M, Z)), rng.normal(size=(B, M, Z)), mask


def formula(name, o, k, mask, tau=0.1):
    """The loss of every kept place, written with loops."""
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    kept = [k[b, m] for b in range(B) for m in range(M) if mask[b, m]]
    found = np.zeros((B, M))
    for b, m in zip(*np.nonzero(mask)):
        if name == "latent_info_nce":
            scores = np.exp([cos(o[b, m], key) / tau for key in kept])
            found[b, m] = -np.log(np.exp(cos(o[b, m], k[b, m]) / tau) / scores.sum())
        elif name == "latent_cosine":
            found[b, m] = 1 - cos(o[b, m], k[b, m])
        else:
            found[b, m] = np.mean((o[b, m] - k[b, m]) ** 2)
    return found


@pytest.mark.parametrize("loss", PAIRS, ids=lambda f: f.__name__)
def test_values_are_those_of_the_formula_in_float64(loss, vectors):
    o, k, mask = vectors
    with jax.enable_x64(True):
        found = loss(jnp.asarray(o), jnp.asarray(k), mask=jnp.asarray(mask))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, formula(loss.__name__, o, k, mask), rtol=1e-12)


@pytest.mark.parametrize("loss", PAIRS, ids=lambda f: f.__name__)
def test_a_masked_place_reaches_neither_value_nor_gradient(loss, vectors):
    o, k, mask = vectors
    spoilt = [np.where(mask[..., None], x, np.nan).astype(np.float32) for x in (o, k)]
    clean = [np.where(mask[..., None], x, 7.0).astype(np.float32) for x in (o, k)]
    run = jax.value_and_grad(lambda o, k: loss(o, k, mask=mask).sum(), argnums=(0, 1))
    (value, grads), (expected, wanted) = run(*spoilt), run(*clean)
    assert value == expected and np.isfinite(value)
    for grad, want in zip(grads, wanted):
        np.testing.assert_array_equal(grad, want)
        assert np.all(np.asarray(grad)[~mask] == 0) and np.any(np.asarray(grad)[mask] != 0)


def test_one_sentence_alone_has_no_negative(vectors):
    o, k, _ = vectors
    mask = np.zeros((B, M), bool)
    mask[2, 1] = True
    assert np.all(np.asarray(latent_info_nce(o, k, mask=mask)) == 0)
    assert np.all(np.asarray(latent_info_nce(o, k, mask=np.zeros((B, M), bool))) == 0)


def test_the_negatives_are_those_of_all_devices(vectors):
    o, k, mask = (x.astype(np.float32) if x.dtype != bool else x for x in vectors)
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))
    run = jax.jit(jax.value_and_grad(lambda o, k, mask: latent_info_nce(o, k, mask=mask).sum(), argnums=(0, 1)))
    one, many = run(o, k, mask), run(*(jax.device_put(x, split) for x in (o, k, mask)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_sentence_is_the_sum_over_its_tokens():
    rng = np.random.default_rng(1)
    hidden, unembed = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(7, 5))
    targets, mask = rng.integers(0, 7, (2, 3, 4)), rng.random((2, 3, 4)) < 0.6
    mask[1, 2] = False
    logits = hidden @ unembed.T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(np.take_along_axis(logp, targets[..., None], -1)[..., 0] * mask).sum(-1)
    with jax.enable_x64(True):
        loss = next_sentence_nll(jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(targets), mask=mask)
        found = np.asarray(loss)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[1, 2] == 0


def test_termination_is_binary_cross_entropy_and_bounded_gradients_far_out():
    logit = np.array([[-300.0, 0.5, 300.0], [-300.0, -0.5, np.nan]], np.float32)
    stop = np.array([[True, True, True], [False, False, False]])
    mask = np.isfinite(logit)
    p = 1 / (1 + np.exp(-0.5))
    found, grad = jax.value_and_grad(lambda x: termination(x, stop, mask=mask).sum())(logit)
    np.testing.assert_allclose(
        termination(logit, stop, mask=mask), [[300, -np.log(p), 0], [0, -np.log(p), 0]], rtol=1e-6
    )
    np.testing.assert_allclose(grad, [[-1, p - 1, 0], [0, 1 - p, 0]], atol=1e-6)
    assert np.isfinite(found)


def test_shapes_that_do_not_fit_are_named(vectors):
    o, k, mask = vectors
    with pytest.raises(ValueError, match=r"expected output and target \[B, M, Z\]"):
        latent_info_nce(o, k[:, :2], mask=mask)
    with pytest.raises(ValueError, match="one shape"):
        termination(o[..., 0], mask[:, :2], mask=mask)
