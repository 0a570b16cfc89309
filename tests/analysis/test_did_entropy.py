"""DID entropy of tokens and sequences: against dense logits, full enumeration, and the estimator's own sums."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.analysis import did
from jaxlm.analysis.did_entropy import (
    bootstrap_did_entropy,
    estimate_did_entropy,
    sequence_did_entropy,
    token_did_entropy,
    tree_did_entropy,
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_token_entropy_from_hidden_states_is_that_of_the_logits(implementation):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, unembed = jax.random.normal(keys[0], (2, 5, 8)), jax.random.normal(keys[1], (50, 8))
    other_hidden, other_unembed = jax.random.normal(keys[2], (2, 5, 6)), jax.random.normal(keys[3], (50, 6))
    expected = did.did_entropy(hidden @ unembed.T, other_hidden @ other_unembed.T)
    mask = jnp.ones((2, 5), bool).at[1, 2].set(False)
    poisoned = hidden.at[1, 2].set(jnp.nan)
    found = token_did_entropy(poisoned, unembed, other_hidden, other_unembed, mask=mask, implementation=implementation)
    np.testing.assert_allclose(found, jnp.where(mask, expected, 0), atol=2e-5)


def test_a_policy_that_is_the_reference_has_the_greatest_token_entropy():
    hidden, unembed = jax.random.normal(jax.random.key(0), (3, 8)), jax.random.normal(jax.random.key(1), (50, 8))
    np.testing.assert_allclose(token_did_entropy(hidden, unembed, hidden, unembed), np.log(50), atol=1e-5)


def steps(rng, vocab, length):
    logits = [rng.normal(size=(vocab**t, vocab)) for t in range(length)]
    return [jnp.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True))) for x in logits]


def sequence_table(steps, vocab, length):
    """log-probability of every sequence, by walking each of them."""
    table, steps = [], [np.asarray(x) for x in steps]
    for tokens in itertools.product(range(vocab), repeat=length):
        prefix, total = 0, 0.0
        for t, token in enumerate(tokens):
            total += steps[t][prefix, token]
            prefix = prefix * vocab + token
        table.append(total)
    return jnp.array(table)


@pytest.mark.parametrize(("vocab", "length"), [(3, 3), (4, 1)])
def test_the_tree_is_the_enumeration(float64, vocab, length):
    rng = np.random.default_rng(0)
    policy, reference = steps(rng, vocab, length), steps(rng, vocab, length)
    tables = [sequence_table(x, vocab, length) for x in (policy, reference)]
    np.testing.assert_allclose(tree_did_entropy(policy, reference), did.did_entropy(*tables), rtol=1e-12)


def test_the_sequence_did_is_not_the_product_of_token_dids(float64):
    rng = np.random.default_rng(0)
    policy, reference = steps(rng, 3, 3), steps(rng, 3, 3)
    total, mass = 0.0, jnp.ones(1)
    for p, r in zip(policy, reference):
        total += jnp.sum(mass * did.did_entropy(p, r))
        mass = (mass[:, None] * jnp.exp(did.did(p, r))).ravel()
    assert abs(total - tree_did_entropy(policy, reference)) > 1e-3


def samples(rng, num, *, num_sets=1, scale=0.7, size=40):
    reference, policy = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=size) * scale)) for _ in range(2))
    draws = rng.choice(size, p=np.exp(policy) / np.exp(policy).sum(), size=(num_sets, num))
    return policy[draws], reference[draws], float(did.did_entropy(policy, reference))


def test_the_estimate_is_its_sums_and_survives_tiny_probabilities(float64):
    policy, reference, _ = samples(np.random.default_rng(0), 30)
    value, ess = estimate_did_entropy(policy[0], reference[0])
    weight = 1 / np.exp(np.asarray(reference[0]))
    ratio = np.asarray(policy[0] - reference[0])
    share = weight / weight.sum()
    np.testing.assert_allclose(value, -np.sum(share * ratio) + np.log(weight.mean()), rtol=1e-12)
    np.testing.assert_allclose(ess, 1 / np.sum(share**2), rtol=1e-12)
    far, far_ess = estimate_did_entropy(policy[0] - 5000, reference[0] - 5000)  # as for responses of 2000 tokens
    np.testing.assert_allclose((far - 5000, far_ess), (value, ess), rtol=1e-9)


def test_few_samples_of_long_responses_are_biased_low_and_many_of_short_ones_are_not(float64):
    rng = np.random.default_rng(0)
    log_reference, log_policy = (np.asarray(jax.nn.log_softmax(jnp.asarray(rng.normal(size=4)))) for _ in range(2))
    exact = float(did.did_entropy(jnp.asarray(log_policy), jnp.asarray(log_reference)))
    error, ess = {}, {}
    for length, num in ((2, 1024), (64, 32)):
        counts = rng.multinomial(length, np.exp(log_policy), size=(100, num))
        values, sizes = estimate_did_entropy(jnp.asarray(counts @ log_policy), jnp.asarray(counts @ log_reference))
        error[length] = (values.mean() - length * exact) / (values.std() / 10)
        ess[length] = sizes.mean()
    assert abs(error[2]) < 4 and error[64] < -4
    assert ess[2] > 200 and ess[64] < 10


def test_the_bootstrap_interval_is_about_as_wide_as_the_spread(float64):
    policy, reference, exact = samples(np.random.default_rng(1), 200, num_sets=100)
    spread = float(estimate_did_entropy(policy, reference)[0].std())
    keys = jax.random.split(jax.random.key(0), 20)
    bootstrap = jax.jit(jax.vmap(lambda p, r, k: bootstrap_did_entropy(p, r, key=k, num_resamples=300)))
    low, high = bootstrap(policy[:20], reference[:20], keys)
    np.testing.assert_allclose((high - low).mean(), 2 * 1.96 * spread, rtol=0.25)
    assert ((low <= exact) & (exact <= high)).sum() >= 16


def test_a_low_effective_sample_size_is_refused_by_name(float64):
    policy, reference, _ = samples(np.random.default_rng(0), 200)
    found = sequence_did_entropy(policy[0], reference[0], key=jax.random.key(0))
    assert found.low < found.entropy < found.high and 10 <= found.ess <= 200
    with pytest.raises(ValueError, match=r"at least min_ess=500, found .* of 200 samples: draw more"):
        sequence_did_entropy(policy[0], reference[0], key=jax.random.key(0), min_ess=500)
    with pytest.raises(ValueError, match="min_ess=10"):
        sequence_did_entropy(jnp.zeros(20), jnp.arange(20) * 5.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="found nan"):
        sequence_did_entropy(jnp.zeros(20), jnp.full(20, jnp.nan), key=jax.random.key(0))
