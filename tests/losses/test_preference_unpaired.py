"""Losses on labelled single responses, their baselines, and what changes a loss from outside."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlm import losses

POLICY, REFERENCE = np.array([-20.0, -25.0]), np.array([-21.0, -24.5])
LABELS = np.array([True, False])
# name -> (loss at beta 0.1, golden values of the desirable and the undesirable, value where policy equals reference)
UNPAIRED = {
    "kto": (partial(losses.kto, beta=0.1, baseline=0.2), (0.480011, 0.482507), None),
    "bco": (partial(losses.bco, beta=0.1, baseline=0.0), (0.644397, 0.668460), np.log(2)),
    "apo_zero_unpaired": (partial(losses.apo_zero_unpaired, beta=0.1), (0.475021, 0.487503), 0.5),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def rows(batch, seed=0):
    rng = np.random.default_rng(seed)
    policy = rng.uniform(-30, -1, size=batch)
    return policy, policy + rng.normal(size=batch), rng.random(batch) < 0.5


@pytest.mark.parametrize("name", UNPAIRED)
def test_golden_values(name):
    fn, golden, equal = UNPAIRED[name]
    with jax.enable_x64(True):
        np.testing.assert_allclose(fn(POLICY, REFERENCE, LABELS), golden, rtol=0, atol=5.1e-7)
    if equal is not None:
        np.testing.assert_allclose(fn(POLICY, POLICY, LABELS), equal, rtol=1e-6)


def test_labels_of_a_pair_add_up_to_the_paired_loss():
    pair = jnp.asarray(POLICY)[:, None], jnp.asarray(REFERENCE)[:, None]
    four = (*pair[0], *pair[1])
    bco = losses.bco(POLICY, REFERENCE, LABELS, beta=0.1, baseline=0.0)
    np.testing.assert_allclose(bco.sum(), losses.bco_pair(*four, beta=0.1)[0], rtol=1e-6)
    apo = losses.apo_zero_unpaired(POLICY, REFERENCE, LABELS, beta=0.1)
    np.testing.assert_allclose(apo.sum(), losses.apo_zero(*four, beta=0.1)[0], rtol=1e-6)


def test_kto_weights_and_equal_models():
    kto = partial(losses.kto, POLICY, POLICY, LABELS, beta=0.1, baseline=0.0)
    np.testing.assert_allclose(kto(), 0.5, rtol=1e-6)
    np.testing.assert_allclose(kto(desirable_weight=1.5, undesirable_weight=0.5), [0.75, 0.25], rtol=1e-6)
    # every label on one side
    for labels in (np.array([True, True]), np.array([False, False])):
        assert np.isfinite(losses.kto(POLICY, REFERENCE, labels, beta=0.1, baseline=0.2)).all()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_sizes(batch):
    policy, reference, labels = rows(batch, seed=batch)
    u = 0.1 * (policy - reference)
    sign = np.where(labels, 1, -1)
    for z in (0.0, 0.7):
        got = losses.kto(policy, reference, labels, beta=0.1, baseline=z)
        np.testing.assert_allclose(got, sigmoid(-sign * (u - 0.1 * z)), rtol=1e-4)
        got = losses.bco(policy, reference, labels, beta=0.1, baseline=z)
        np.testing.assert_allclose(got, -np.log(sigmoid(sign * (u - z))), rtol=1e-4)


@pytest.mark.parametrize("name", UNPAIRED)
def test_extreme_inputs_gradients_and_vmap(name):
    fn = UNPAIRED[name][0]
    policy, reference, labels = (x.ravel() for x in np.meshgrid([-1e4, 0.0, 1e4], [-1e4, 0.0, 1e4], [True, False]))

    def total(p, r):
        return fn(p, r, labels).sum()

    loss, grads = jax.value_and_grad(total, (0, 1))(policy.astype(np.float32), reference.astype(np.float32))
    assert np.isfinite(loss) and np.isfinite(grads).all()
    policy, reference, labels = rows(18)
    with jax.enable_x64(True):
        check_grads(lambda p, r: fn(p, r, labels), (policy, reference), order=1, modes="rev")
    whole = fn(policy, reference, labels)
    mapped = jax.vmap(fn)(policy, reference, labels)
    np.testing.assert_allclose(mapped, whole, rtol=1e-6)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (policy, reference)]
    np.testing.assert_array_equal(fn(*narrow, labels), fn(*[x.astype(jnp.float32) for x in narrow], labels))


@pytest.mark.parametrize("fn", [losses.kto, losses.bco])
def test_no_gradient_flows_through_the_baseline(fn):
    def total(policy, baseline):
        return fn(policy, REFERENCE, LABELS, beta=0.1, baseline=baseline).sum()

    grad_policy, grad_baseline = jax.grad(total, (0, 1))(jnp.asarray(POLICY), 0.2)
    assert float(grad_baseline) == 0 and grad_policy[0] < 0 < grad_policy[1]


def test_kto_baseline():
    policy, reference = jnp.array([-30.0, -40.0, jnp.nan]), jnp.array([-31.0, -40.5, jnp.nan])
    mask = jnp.array([True, True, False])
    np.testing.assert_allclose(losses.kto_baseline(policy, reference, mask), 0.75)
    assert float(losses.kto_baseline(reference, policy, mask)) == 0  # never negative
    assert float(losses.kto_baseline(policy, reference, jnp.zeros(3, bool))) == 0  # nothing to mismatch
    assert float(losses.kto_baseline(policy[:1], reference[:1])) == 1  # one row, mismatched by the caller


@pytest.mark.parametrize("batch", [2, 3, 4, 5])
def test_no_row_is_mismatched_with_itself(batch):
    rows = losses.mismatched_rows(batch)
    assert (rows != np.arange(batch)).all() and sorted(rows.tolist()) == list(range(batch))


def test_one_row_cannot_be_mismatched():
    with pytest.raises(
        ValueError, match="at least 2 rows to mismatch, found 1; raise the batch size, pass baseline=0.0"
    ):
        losses.mismatched_rows(1)


def test_bco_baseline_is_the_mean_over_all_batches():
    policy, reference, _ = rows(5)
    rewards = 0.1 * (policy - reference)
    mean, count = losses.bco_baseline(policy[:2], reference[:2], beta=0.1)
    np.testing.assert_allclose((mean, count), (rewards[:2].mean(), 2), rtol=1e-4)
    mask = np.array([True, False, True])
    mean, count = losses.bco_baseline(policy[2:], reference[2:], beta=0.1, mask=mask, previous=(mean, count))
    np.testing.assert_allclose((mean, count), (rewards[[0, 1, 2, 4]].mean(), 4), rtol=1e-4)
    mean, count = losses.bco_baseline(policy[:2], reference[:2], beta=0.1, mask=np.zeros(2, bool))
    assert (float(mean), float(count)) == (0, 0)


def test_bco_density_weight():
    p = jnp.array([0.0, 0.5, 0.75, 1.0, 0.9])
    labels = jnp.array([False, False, False, False, True])
    assert losses.bco_density_weight(p, labels).tolist() == [0.5, 1.0, 3.0, 10.0, 1.0]
    with pytest.raises(ValueError, match="expected 0 <= least <= most, found least=2.0 and most=1.0"):
        losses.bco_density_weight(p, labels, least=2.0, most=1.0)


def test_weighted_sum():
    four = [jnp.full(3, x) for x in (-20.0, -25.0, -21.0, -24.5)]
    parts = (
        losses.dpo(*four, beta=0.1),
        losses.bco_pair(*four, beta=0.1),
        losses.sft(four[0], chosen_length=jnp.ones(3)),
    )
    mpo = losses.weighted_sum(parts, (0.8, 0.2, 1.0))
    np.testing.assert_allclose(mpo, np.full(3, 0.8 * 0.620957 + 0.2 * 1.312856 + 20), rtol=1e-6)
    np.testing.assert_array_equal(losses.weighted_sum(parts[:1], [1.0]), parts[0])
    for weights in ((1.0,), (1.0,) * 4):
        with pytest.raises(ValueError, match=f"found 3 losses and {len(weights)} weights"):
            losses.weighted_sum(parts, weights)
    with pytest.raises(ValueError, match="at least one loss, found 0 losses"):
        losses.weighted_sum([], [])
    with pytest.raises(ValueError, match=r"found .*'losses\[1\]': \(\)"):
        losses.weighted_sum((parts[0], parts[1].mean()), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"expected weights\[1\] to be finite, found nan"):
        losses.weighted_sum(parts[:2], (1.0, float("nan")))


def tokens():
    chosen = jnp.array([[-1.0, -2.0, -4.0, jnp.nan], [-1.0, -1.0, -1.0, -1.0], [-3.0, jnp.nan, -5.0, -7.0]])
    chosen_mask = jnp.array([[True, True, True, False], [True] * 4, [True, False, True, True]])
    rejected = jnp.array([[-3.0, -5.0], [jnp.nan, jnp.nan], [-2.0, -6.0]])
    rejected_mask = jnp.array([[True, True], [False, False], [True, True]])
    return chosen, rejected, {"chosen_mask": chosen_mask, "rejected_mask": rejected_mask}


def test_length_desensitised_sums():
    chosen, rejected, masks = tokens()
    sums = partial(losses.length_desensitised_sums, chosen, rejected, **masks)
    # row 1: an empty rejected response, so all of the chosen is excess; row 2: a gap in the mask is not counted
    assert [x.tolist() for x in sums(ld_alpha=0.5)] == [[-5.0, -2.0, -11.5], [-8.0, 0.0, -8.0]]
    assert [x.tolist() for x in sums(ld_alpha=0.0)] == [[-3.0, 0.0, -8.0], [-8.0, 0.0, -8.0]]
    plain = [losses.seq_logprob(chosen, masks["chosen_mask"]), losses.seq_logprob(rejected, masks["rejected_mask"])]
    for got, want in zip(sums(ld_alpha=1.0), plain):
        np.testing.assert_array_equal(got, want)
    grad = jax.grad(lambda x: losses.length_desensitised_sums(x, rejected, **masks, ld_alpha=0.5)[0].sum())(chosen)
    assert grad.tolist() == [[1.0, 1.0, 0.5, 0.0], [0.5] * 4, [1.0, 0.0, 1.0, 0.5]]
    with pytest.raises(ValueError, match=r"expected ld_alpha in \[0, 1\], found 1.5"):
        sums(ld_alpha=1.5)


def test_wpo_weight():
    chosen, _, masks = tokens()
    log_sum_p2 = jnp.where(masks["chosen_mask"], -1.5, jnp.nan)
    weight = losses.wpo_weight(chosen, log_sum_p2, masks["chosen_mask"])
    np.testing.assert_allclose(weight, np.exp([1.5 - 7 / 3, 0.5, 1.5 - 5.0]), rtol=1e-6)
    empty = jnp.zeros_like(masks["chosen_mask"])
    np.testing.assert_array_equal(losses.wpo_weight(chosen, log_sum_p2, empty), 1.0)
    grad = jax.grad(lambda x: losses.wpo_weight(x, log_sum_p2, masks["chosen_mask"]).sum())(chosen)
    assert not np.asarray(grad).any()


def test_mix_reference():
    policy, reference = (
        {"a": jnp.ones(2), "b": [jnp.full(1, 4.0)]},
        {"a": jnp.zeros(2), "b": [jnp.zeros(1, jnp.bfloat16)]},
    )
    mixed = losses.mix_reference(policy, reference)
    np.testing.assert_allclose(mixed["a"], 0.6, rtol=1e-6)
    assert mixed["b"][0].dtype == jnp.bfloat16 and float(mixed["b"][0][0]) == pytest.approx(2.4, rel=1e-2)
    np.testing.assert_array_equal(losses.mix_reference(policy, reference, policy_weight=1.0)["a"], policy["a"])
    np.testing.assert_array_equal(losses.mix_reference(policy, reference, policy_weight=0.0)["a"], reference["a"])
    with pytest.raises(ValueError, match=r"expected policy_weight in \[0, 1\], found 512"):
        losses.mix_reference(policy, reference, policy_weight=512)


@pytest.mark.parametrize("name", UNPAIRED)
def test_bad_input_is_refused(name):
    fn = UNPAIRED[name][0]
    with pytest.raises(ValueError, match="expected beta positive and finite, found -1.0"):
        fn(POLICY, REFERENCE, LABELS, beta=-1.0)
    with pytest.raises(ValueError, match=r"found .*'desirable': \(3,\)"):
        fn(POLICY, REFERENCE, np.ones(3, bool))


@pytest.mark.parametrize("weight", ["desirable_weight", "undesirable_weight"])
def test_a_negative_kto_weight_is_refused(weight):
    with pytest.raises(ValueError, match=f"expected {weight} at least 0 and finite, found -1.0; it multiplies"):
        losses.kto(POLICY, REFERENCE, LABELS, beta=0.1, baseline=0.0, **{weight: -1.0})
