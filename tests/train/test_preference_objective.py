"""Preference objectives on packed rows: every loss by its name, divergences, sums, metrics, single responses."""

from __future__ import annotations

import inspect
import math
import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import losses
from jaxlm.recipes.preference_losses import BY_RANK, PAIRS, LossTerm, make_response_values
from jaxlm.train.preference import MAX_TILT, Responses, make_response_objective, make_scorer

SETUP = runpy.run_path(str(Path(__file__).with_name("preference_setup.py")))
SCORE, OPTIONS, params_of, data_of, batch_of, packed, term_of, objective_of = (
    SETUP[name]
    for name in ("SCORE", "OPTIONS", "params_of", "data_of", "batch_of", "packed", "term_of", "objective_of")
)


def numbers(packed) -> tuple[Responses, jax.Array, dict[str, np.ndarray]]:
    """Scores with empty slots, the reference's, and the present pairs alone as the arguments of a loss."""
    _, _, _, policy, reference = packed
    # Two strange models differ by many nats: the losses are to be compared where they bend.
    referred = policy.logprob + 0.1 * (reference.logprob - policy.logprob)
    present = np.asarray(policy.length > 0)[:, ::2]
    assert 0 < present.sum() < present.size

    def sides(x):
        x = np.asarray(x).reshape(len(x), -1, 2)
        return x[present, 0], x[present, 1]

    policy_sums, reference_sums, lengths = sides(policy.logprob), sides(referred), sides(policy.length)
    return policy, referred, dict(
        policy_chosen=policy_sums[0], policy_rejected=policy_sums[1],
        reference_chosen=reference_sums[0], reference_rejected=reference_sums[1],
        chosen_length=lengths[0], rejected_length=lengths[1],
    )  # fmt: skip


def direct(name: str, pairs: dict[str, np.ndarray], **more):
    function = PAIRS[name]
    takes = inspect.signature(function).parameters
    arrays = {n: jnp.asarray(x) for n, x in pairs.items() if n in takes}
    return function(**arrays, **OPTIONS.get(name, dict(beta=0.1)), **more)


def total_and_gradient(name: str, policy: Responses, referred):
    """(total, weight) of an objective, and the total's gradient in every slot's log-probability."""
    reference = referred if term_of(name).needs_reference else None

    def total(logprob):
        return objective_of(term_of(name))(policy._replace(logprob=logprob), reference, {})[:2]

    return jax.value_and_grad(total, has_aux=True)(policy.logprob)


@pytest.fixture(scope="module")
def by_name(packed):
    """name -> (objective on packed rows, the same on a batch without pairs, the function on the pairs alone)."""
    policy, referred, pairs = numbers(packed)
    objectives = jax.jit(lambda *given: {name: total_and_gradient(name, *given) for name in PAIRS})

    @jax.jit
    def functions(chosen, rejected):
        def total(c, r, name):
            return direct(name, pairs | dict(policy_chosen=c, policy_rejected=r)).sum()

        return {name: jax.value_and_grad(partial(total, name=name), (0, 1))(chosen, rejected) for name in PAIRS}

    given = objectives(policy, referred), objectives(*jax.tree.map(jnp.zeros_like, (policy, referred)))
    expected = functions(pairs["policy_chosen"], pairs["policy_rejected"])
    return {name: (given[0][name], given[1][name], expected[name]) for name in PAIRS}


@pytest.mark.parametrize("name", PAIRS)
def test_every_loss_gives_what_its_function_gives(packed, by_name, name):
    present = np.asarray(packed[3].length > 0)
    ((total, weight), grads), nothing, (expected, sides) = by_name[name]
    assert weight == present.sum() / 2 == 9
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    np.testing.assert_array_equal(grads[~present], 0)
    np.testing.assert_allclose(grads[present].reshape(-1, 2), np.stack(sides, 1), rtol=2e-5, atol=1e-7)
    assert np.isfinite(grads).all() and np.abs(grads).max() > 1e-3
    (total, weight), grads = nothing
    assert total == 0 and weight == 0
    np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize("name", BY_RANK)
def test_losses_by_rank_survive_huge_margins_and_ties(name):
    """The filling of empty slots must stay behind whatever pairs there are."""
    logprob = jnp.array([[-1e5, -1.0, 0.0, 0.0], [-3.0, -1e5, -50.0, -50.0], [0.0, 0.0, -7.0, -7.0]])
    length = jnp.where(logprob < 0, 1.0, 0.0)
    reference = jnp.array([[-1.0, -1e5, 0, 0], [-3.0, -3.0, -50.0, -50.0], [0.0, 0.0, -1.0, -9.0]])
    got, weight, _ = objective_of(term_of(name))(Responses(logprob, length, length), reference, {})
    keep = np.array([0, 2, 3, 5])
    columns = (logprob.reshape(-1, 2)[keep], reference.reshape(-1, 2)[keep])
    expected = PAIRS[name](*(x[:, side] for x in columns for side in (0, 1)), **OPTIONS[name])
    assert weight == 4
    np.testing.assert_allclose(got, expected.sum(), rtol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_reach_the_loss(packed, divergence):
    policy, referred, pairs = numbers(packed)
    chosen_map = getattr(losses, divergence)
    chosen_map = partial(chosen_map, alpha=0.3) if divergence == "alpha_divergence" else chosen_map
    total, _, _ = objective_of(term_of("hinge", divergence=divergence, alpha=0.3))(policy, referred, {})
    np.testing.assert_allclose(total, direct("hinge", pairs, divergence=chosen_map).sum(), rtol=2e-6)
    assert abs(float(total - direct("hinge", pairs).sum())) > 1e-3


def test_a_sum_of_losses_is_weighted(packed):
    policy, referred, pairs = numbers(packed)
    weights = {"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0, "aot": 0.5}
    total, _, _ = objective_of(*(term_of(n, weight=w) for n, w in weights.items()))(policy, referred, {})
    np.testing.assert_allclose(total, sum(w * direct(n, pairs).sum() for n, w in weights.items()), rtol=2e-6)


def test_metrics_against_numpy(packed):
    policy, referred, pairs = numbers(packed)
    beta = 0.3
    term = LossTerm("dpo", options=dict(beta=beta))
    _, _, metrics = jax.jit(objective_of(term, beta=beta))(policy, referred, {})
    value = {
        name: float(total) / (1.0 if weight is None else float(weight)) for name, (total, weight) in metrics.items()
    }
    p = {name: np.asarray(x, np.float64) for name, x in pairs.items()}
    a, b = (p[f"policy_{s}"] - p[f"reference_{s}"] for s in ("chosen", "rejected"))
    tokens = p["chosen_length"].sum() + p["rejected_length"].sum()
    tilt = {s: np.exp(np.clip(s * x, -MAX_TILT, MAX_TILT)) for s, x in ((beta, b), (-beta, a))}
    expected = {
        "loss": np.log1p(np.exp(-beta * (a - b))).mean(),
        "rewards_chosen": beta * a.mean(),
        "rewards_rejected": beta * b.mean(),
        "margins": beta * (a - b).mean(),
        "accuracies": (a > b).mean(),
        "logprob_chosen": p["policy_chosen"].mean(),
        "logprob_rejected": p["policy_rejected"].mean(),
        "chosen_tokens": p["chosen_length"].mean(),
        "rejected_tokens": p["rejected_length"].mean(),
        "entropy": np.asarray(policy.entropy, np.float64).sum() / tokens,
        "tokens": tokens,
        "pairs": 9,
        "displacement_chosen": a.mean(),
        "displacement_rejected": b.mean(),
        "displacement_chosen_predicted": (tilt[beta] * b).sum() / tilt[beta].sum(),
        "displacement_rejected_predicted": (tilt[-beta] * a).sum() / tilt[-beta].sum(),
        "ordered": (a > b).mean(),
    }
    assert value.keys() == expected.keys()
    assert 0 < expected["accuracies"] < 1
    for name, want in expected.items():
        np.testing.assert_allclose(value[name], want, rtol=2e-5, atol=1e-6, err_msg=name)


def test_metrics_without_a_reference(packed):
    policy, _, pairs = numbers(packed)
    p = {name: np.asarray(x, np.float64) for name, x in pairs.items()}
    means = {s: p[f"policy_{s}"] / p[f"{s}_length"] for s in ("chosen", "rejected")}
    _, _, metrics = objective_of(term_of("simpo"))(policy, None, {})
    assert not any(name.startswith("displacement") or name == "ordered" for name in metrics)
    for name, want in {
        "rewards_chosen": 2 * means["chosen"].mean(),
        "margins": 2 * (means["chosen"] - means["rejected"]).mean(),
        "accuracies": (means["chosen"] > means["rejected"]).mean(),
    }.items():
        np.testing.assert_allclose(metrics[name][0] / metrics[name][1], want, rtol=1e-5, err_msg=name)
    _, _, metrics = objective_of(term_of("cpo"))(policy, None, {})  # compares sums
    margin = 0.1 * (p["policy_chosen"] - p["policy_rejected"]).mean()
    np.testing.assert_allclose(metrics["margins"][0] / metrics["margins"][1], margin, rtol=1e-5)


def test_rewards_are_what_the_loss_compares():
    """A chosen response that is likelier as a whole, and less likely per token: the loss says that it loses."""
    scored = Responses(jnp.array([[-9.0, -8.9]]), jnp.zeros((1, 2)), jnp.array([[20.0, 1.0]]))
    reference = jnp.array([[-11.0, -10.0]])
    total, _, metrics = objective_of(term_of("dpo_norm"))(scored, reference, {})
    assert total > math.log(2)  # 2 / 20 against 1.1 / 1
    assert metrics["accuracies"][0] == 0


def test_metrics_stay_finite_far_from_the_reference_and_without_pairs():
    logprob, ones = jnp.array([[-1.0, -2e4, -2e4, -1.0]]), jnp.ones((1, 4))
    for length in (ones, 0 * ones):
        scored = Responses(logprob, ones, length)
        metrics = objective_of(term_of("dpo"))(scored, jnp.array([[-2e4, -1.0, -1.0, -2e4]]), {})[2]
        assert all(np.isfinite(x) for pair in metrics.values() for x in pair if x is not None)


@pytest.fixture(scope="module")
def responses():
    """Labelled responses, each beside a mismatched one: data, batch, and the scores of policy and reference."""
    data = data_of("responses_mismatched")
    batch = batch_of(data)
    score = jax.jit(make_scorer(SCORE, slots=data.slots), static_argnums=2)
    policy, reference = (score(params_of(seed), batch, None) for seed in (0, 1))
    return batch, policy, policy.logprob + 0.05 * (reference.logprob - policy.logprob)


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
@pytest.mark.parametrize("sign", [1, -1])
def test_losses_of_responses_equal_direct_calls(responses, name, sign):
    batch, policy, reference = responses
    # With the other sign KTO's baseline is bounded by 0 the other way.
    reference = policy.logprob + sign * (reference - policy.logprob)
    mismatched = name == "kto"
    if not mismatched:  # the very same responses, without the borrowed ones
        policy, reference = Responses(*(x[:, ::2] for x in policy)), reference[:, ::2]
        batch = dict(batch, labels=batch["labels"][:, ::2])
    options = dict(beta=0.2) | (dict(desirable_weight=1.2, undesirable_weight=0.7) if name == "kto" else {})
    term = LossTerm(name, options=options)
    objective = make_response_objective(make_response_values(term), beta=0.2, mismatched=mismatched)
    total, weight, metrics = jax.jit(objective)(policy, reference, batch)

    step = 2 if mismatched else 1
    present = np.asarray(policy.length[:, ::step] > 0)
    own, referred = (np.asarray(x[:, ::step])[present] for x in (policy.logprob, reference))
    labels = np.asarray(batch["labels"])[:, ::step][present]
    assert weight == len(own) == 9 and 0 < labels.sum() < 9
    arrays = tuple(map(jnp.asarray, (own, referred, labels)))
    if name == "kto":
        others = [np.asarray(x[:, 1::2])[present] for x in (policy.logprob, reference)]
        baseline = max(0.0, float(np.mean(others[0].astype(np.float64) - others[1])))
        expected = losses.kto(*arrays, baseline=baseline, **options)
    elif name == "bco":
        expected = losses.bco(*arrays, baseline=float(np.mean(0.2 * (own.astype(np.float64) - referred))), **options)
    else:
        expected = losses.apo_zero_unpaired(*arrays, **options)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)

    value = {n: float(t) / (1.0 if w is None else float(w)) for n, (t, w) in metrics.items()}
    reward = 0.2 * (own - referred)
    scored = np.asarray(policy.entropy).sum() / np.asarray(policy.length).sum()
    for n, want in {
        "loss": expected.mean(), "rewards_chosen": reward[labels].mean(), "rewards_rejected": reward[~labels].mean(),
        "logprob_chosen": own[labels].mean(), "logprob_rejected": own[~labels].mean(), "responses": 9,
        "entropy": scored, "tokens": np.asarray(policy.length).sum(),
    }.items():  # fmt: skip
        np.testing.assert_allclose(value[n], want, rtol=1e-5, err_msg=n)

    def by_logprob(logprob, scored, referred):
        return objective(scored._replace(logprob=logprob), referred, batch)[:2]

    value_and_grad = jax.jit(jax.value_and_grad(by_logprob, has_aux=True))
    _, grads = value_and_grad(policy.logprob, policy, reference)
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(grads[np.asarray(policy.length) == 0], 0)
    if mismatched:
        np.testing.assert_array_equal(grads[:, 1::2], 0)  # the baseline is detached
    assert (grads[:, ::step][present][labels] < 0).all() and (grads[:, ::step][present][~labels] > 0).all()

    nothing = jax.tree.map(jnp.zeros_like, (policy.logprob, policy, reference))
    (total, weight), grads = value_and_grad(*nothing)
    assert total == 0 and weight == 0
    np.testing.assert_array_equal(grads, 0)
