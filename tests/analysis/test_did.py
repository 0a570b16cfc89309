"""The DID and its curve: each statement of the theory against plain sums, and the identities that follow from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.analysis import did

NUM = 12


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=range(2))
def policies(request):
    """Reference, target and an unrelated policy, log-probabilities."""
    rng = np.random.default_rng(request.param)
    return [jax.nn.log_softmax(jnp.asarray(rng.normal(size=NUM) * 1.5)) for _ in range(3)]


def close(actual, expected, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


def test_did_is_the_normalised_ratio_and_turns_the_reference_into_the_policy(policies):
    reference, target, _ = policies
    ratio = np.exp(np.asarray(target)) / np.exp(np.asarray(reference))
    q = did.did(target, reference)
    close(np.exp(q), ratio / ratio.sum())
    product = np.exp(np.asarray(reference)) * np.exp(q)  # Bayes: policy ∝ reference * DID
    close(product / product.sum(), np.exp(target))
    close(did.did(target + 3.0, reference - 1.0), q)


def test_entropy_kl_and_jsd_are_their_sums_with_zero_log_zero():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
    with np.errstate(divide="ignore"):
        log_p, log_q = jnp.asarray(np.log(p)), jnp.asarray(np.log(q))
    close(did.entropy(log_p), np.log(2))
    close(did.kl(log_p, log_q), 0.5 * np.log(2))
    assert did.kl(log_q, log_p) == np.inf
    m = (p + q) / 2
    expected = 0.5 * (0.5 * np.log(0.5 / m[0]) + 0.5 * np.log(0.5 / m[1]))
    expected += 0.5 * (0.25 * np.log(0.25 / m[0]) + 0.5 * np.log(0.5 / m[1]) + 0.25 * np.log(0.25 / m[2]))
    close(did.jsd(log_p, log_q), expected)
    close(did.jsd(log_q, log_p), expected)
    assert did.jsd(log_p, log_p) == 0
    assert np.isfinite(jax.grad(lambda x: did.entropy(jax.nn.log_softmax(x)))(jnp.array([0.0, -800.0]))).all()


def test_the_did_entropy_is_greatest_exactly_at_the_reference(policies):
    reference, target, _ = policies
    close(did.did_entropy(reference, reference), np.log(NUM))
    assert did.did_entropy(target, reference) < np.log(NUM) - 0.01


def test_everything_takes_leading_axes(policies):
    reference, target, other = policies
    both = jnp.stack([target, other])
    references = jnp.stack([reference, reference])
    for function in (did.did_entropy, did.jsd, did.kl, did.preference_probability, did.did):
        close(function(both, references)[1], function(other, reference))
    scales = jnp.array([0.3, -2.0])
    close(did.tilt(references, both, scales)[1], did.tilt(reference, other, -2.0))
    means = jnp.array([0.1, -0.2])
    rewards = both - references
    close(did.solve_tilt(references, rewards, means)[1], did.solve_tilt(reference, rewards[1], -0.2))


def test_a_preference_is_the_posterior_over_which_source_emitted_which(policies):
    _, chosen, rejected = policies
    w, r = np.exp(np.asarray(chosen)), np.exp(np.asarray(rejected))
    expected = [[w[a] * r[b] / (w[a] * r[b] + w[b] * r[a]) for b in range(NUM)] for a in range(NUM)]
    close(did.preference_probability(chosen, rejected), expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_the_optimal_rejected_distribution_satisfies_the_power_law_and_inverts(policies, beta):
    reference, target, _ = policies
    rejected = did.optimal_rejected(target, reference, beta=beta)
    p, ref = np.exp(np.asarray(target)), np.exp(np.asarray(reference))
    expected = ref * (ref / p) ** beta
    close(np.exp(rejected), expected / expected.sum())
    power = np.exp(np.asarray(did.did(target, reference))) ** beta
    close(np.exp(did.did(reference, rejected)), power / power.sum())
    close(did.dpo_optimum(reference, rejected, reference, beta=beta), target, 1e-11)
    reward = beta * did.did(target, reference)
    close(did.preference_probability(reference, rejected), jax.nn.sigmoid(reward[:, None] - reward[None, :]))


def test_the_dpo_optimum_has_no_gradient_and_others_have(policies):
    reference, chosen, rejected = policies
    beta = 0.7
    weights = jnp.exp(chosen[:, None] + rejected[None, :])

    def loss(logits):
        reward = beta * (jax.nn.log_softmax(logits) - reference)
        return -jnp.sum(weights * jax.nn.log_sigmoid(reward[:, None] - reward[None, :]))

    close(jax.grad(loss)(did.dpo_optimum(chosen, rejected, reference, beta=beta)), 0, 1e-15)
    assert jnp.abs(jax.grad(loss)(chosen)).max() > 1e-3


@pytest.mark.parametrize("s", [-1.0, 0.0, 0.3, 1.0, 2.5])
def test_any_pair_a_beta_apart_on_the_curve_teaches_the_target(policies, s):
    reference, target, _ = policies
    beta, reward = 0.6, target - reference
    chosen, rejected = did.tilt(reference, reward, s), did.tilt(reference, reward, s - beta)
    close(did.dpo_optimum(chosen, rejected, reference, beta=beta), target, 1e-11)


def test_the_curve_holds_the_reference_the_target_and_the_rejected(policies):
    reference, target, _ = policies
    reward = target - reference
    close(did.tilt(reference, reward, 0.0), reference)
    close(did.tilt(reference, reward, 1.0), target)
    close(did.tilt(reference, reward, -0.3), did.optimal_rejected(target, reference, beta=0.3))
    close(did.log_partition(reference, reward, jnp.array(0.0)), 0)
    close(did.log_partition(reference, reward, jnp.array(1.0)), 0)


def test_identity_1_the_mean_is_the_slope_of_the_partition_and_rises(policies):
    reference, target, _ = policies
    reward = target - reference
    scales = jnp.linspace(-2, 2, 9)
    slope = jax.vmap(jax.grad(lambda s: did.log_partition(reference, reward, s)))(scales)
    means = jax.vmap(lambda s: did.tilted_mean(reference, reward, s))(scales)
    close(means, slope)
    close(means, [np.sum(np.exp(did.tilt(reference, reward, s)) * reward) for s in scales])
    assert (jnp.diff(means) > 0).all()


def test_identity_2_displacement(policies):
    reference, target, _ = policies
    reward, beta = target - reference, 0.4
    chosen = did.expected_change(reference, reference, target)
    rejected = did.expected_change(did.optimal_rejected(target, reference, beta=beta), reference, target)
    close(chosen, -did.kl(reference, target))
    close(chosen, did.tilted_mean(reference, reward, 0.0))
    close(rejected, did.tilted_mean(reference, reward, -beta))
    assert rejected < chosen < 0


def test_identity_3_crossover(policies):
    reference, target, _ = policies
    reward = target - reference
    s0 = did.solve_tilt(reference, reward, 0.0)
    close(did.tilted_mean(reference, reward, s0), 0)
    assert 0 < s0 < 1
    for beta in (0.5 * s0, 0.99 * s0, 1.01 * s0, 1.0, 3.0):
        chosen = did.tilt(reference, reward, beta)
        assert (did.expected_change(chosen, reference, target) > 0) == (beta > s0)
        close(did.expected_change(reference, reference, target), -did.kl(reference, target))
        close(did.dpo_optimum(chosen, reference, reference, beta=float(beta)), target, 1e-10)


def test_identity_4_the_did_entropy_falls_along_the_curve(policies):
    reference, target, _ = policies
    reward = target - reference
    uniform = jnp.full(NUM, -jnp.log(NUM))
    for s in (0.2, 1.0, 2.0):
        h = 1e-4
        after, before = (did.did_entropy(did.tilt(reference, reward, s + d), reference) for d in (h, -h))
        q = did.tilt(uniform, reward, s)  # ∝ exp(s reward)
        close(did.did(did.tilt(reference, reward, s), reference), q)
        variance = did.expectation(q, reward**2) - did.expectation(q, reward) ** 2
        close((after - before) / (2 * h), -s * variance, 1e-6)
        assert after < before


def test_identity_5_the_entropy_of_the_policy_rises_where_the_reward_opposes_it(policies):
    reference, target, _ = policies
    reward = target - reference
    for s in (-0.5, 0.0, 0.7):
        policy = did.tilt(reference, reward, s)
        covariance = did.expectation(policy, reward * policy)
        covariance -= did.expectation(policy, reward) * did.expectation(policy, policy)
        slope = jax.grad(lambda s: did.entropy(did.tilt(reference, reward, s)))(s)
        close(slope, -covariance)


def test_identity_6_without_a_reference_the_optimum_is_the_did(policies):
    reference, target, _ = policies
    beta = 0.8
    rejected = did.optimal_rejected(target, reference, beta=beta)
    uniform = jnp.full(NUM, -jnp.log(NUM))  # CPO is DPO with a uniform reference
    close(did.dpo_optimum(reference, rejected, uniform, beta=beta), did.did(target, reference))
    assert did.jsd(did.did(target, reference), target) > 1e-3


@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.9])
def test_solve_tilt_against_a_grid(policies, mean):
    reference, target, _ = policies
    reward = target - reference
    s = float(did.solve_tilt(reference, reward, mean))
    close(did.tilted_mean(reference, reward, s), mean, 1e-11)
    grid = np.linspace(s - 3, s + 3, 600)  # even, so that s itself is not on it
    side = np.array([did.tilted_mean(reference, reward, x) > mean for x in grid[::60]])
    assert (side == (grid[::60] > s)).all()


def test_misalignment_splits_the_distance_to_the_reference(policies):
    reference, policy, other = policies
    reward = other - reference
    g, waste = did.misalignment(policy, reference, reward)
    tilted = did.tilt(reference, reward, g)
    close(did.expectation(tilted, reward), did.expectation(policy, reward), 1e-11)
    close(did.kl(policy, reference), waste + did.kl(tilted, reference), 1e-11)
    assert waste > 0
    close(did.misalignment(did.tilt(reference, reward, 1.7), reference, reward), (1.7, 0.0), 1e-9)


def test_a_constant_reward_tilts_nothing(policies):
    reference, policy, _ = policies
    g, waste = did.misalignment(policy, reference, jnp.full(NUM, 0.3))
    assert g == 0
    close(waste, did.kl(policy, reference))


def test_margins_are_ordered_by_the_power_law_on_every_pair(policies):
    reference, target, other = policies
    upper = np.triu_indices(NUM, 1)
    rejected = did.optimal_rejected(target, reference, beta=0.5)
    m_target, m_ref, m_rejected, m_other = (did.margins(x)[upper] for x in (target, reference, rejected, other))
    close(m_target - m_ref, (m_ref - m_rejected) / 0.5)
    assert did.ordered_share(m_target, m_ref, m_rejected) == 1
    between = [(t > r > o) or (t < r < o) for t, r, o in zip(m_target, m_ref, m_other)]
    close(did.ordered_share(m_target, m_ref, m_other), np.mean(between))
    fit = did.power_law(m_ref - m_rejected, m_target - m_ref)
    close([fit.slope, fit.r2], [0.5, 1.0])


def test_independent_policies_are_ordered_on_a_third_of_the_pairs():
    margins = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40_000)))
    close(did.ordered_share(*margins), 1 / 3, 0.01)


def test_power_law_is_least_squares_through_the_origin_whichever_response_comes_first():
    rng = np.random.default_rng(0)
    reward = rng.normal(size=200)
    evidence = 0.3 * reward + 0.1 * rng.normal(size=200)
    fit = did.power_law(jnp.asarray(evidence), jnp.asarray(reward))
    (slope,), (residual,), *_ = np.linalg.lstsq(reward[:, None], evidence, rcond=None)
    close(fit.slope, slope)
    close(fit.r2, 1 - residual / np.sum(evidence**2))
    swap = jnp.asarray(rng.choice([-1.0, 1.0], size=200))
    close(did.power_law(swap * evidence, swap * reward), fit)
    assert fit.r2 < 0.95
