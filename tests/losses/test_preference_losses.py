"""Preference losses of pairs: golden values, closed forms, extreme and degenerate inputs, gradients, errors."""

from __future__ import annotations

from functools import partial
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlm import losses

# The golden input: log-ratios a = 1 and b = -0.5, margin 1.5.
POLICY, REFERENCE, LENGTHS = (-20.0, -25.0), (-21.0, -24.5), (8, 5)
LOG2 = log(2)
HALF = partial(losses.alpha_divergence, alpha=0.5)
DIVERGENCES = {
    "reverse_kl": (losses.reverse_kl, 0.620957),
    "forward_kl": (losses.forward_kl, 0.631154),
    "js": (losses.js_divergence, 0.660652),
    "alpha": (HALF, 0.627691),
}
# name -> (loss at beta 0.1, golden value, value where the policy equals the reference)
MARGIN = {
    "dpo": (losses.dpo, 0.620957, LOG2),
    "cdpo": (partial(losses.cdpo, label_smoothing=0.1), 0.635957, LOG2),
    "robust_dpo": (partial(losses.robust_dpo, label_smoothing=0.1), 0.602207, LOG2),
    "hinge": (losses.hinge, 0.85, 1.0),
    "ipo": (losses.ipo, 22.800625, 25.0),
    "ipo_sum": (losses.ipo_sum, 12.25, 25.0),
    "dpo_norm": (losses.dpo_norm, 0.681960, LOG2),
    "exo": (partial(losses.exo, label_smoothing=1e-3), 2.505517, -LOG2 - (log(1 - 1e-3) + log(1e-3)) / 2),
    "discopop": (losses.discopop, 0.849338, (1 + LOG2) / 2),
    "discopop, tau 1": (partial(losses.discopop, tau=1.0), 0.749806, (1 + LOG2) / 2),
}
POINTWISE = {
    "nca": (losses.nca, 1.350825, 2 * LOG2),
    "bco_pair": (losses.bco_pair, 1.312856, 2 * LOG2),
    "sppo_hard": (losses.sppo_hard, 36.25, 50.0),
    "apo_zero": (losses.apo_zero, 0.962523, 1.0),
    "apo_down": (losses.apo_down, 0.987549, 1.0),
    # one pair is its own order: cdpo's and dpo's values
    "aot": (partial(losses.aot, label_smoothing=0.1), 0.635957, LOG2),
    "aot_unpaired": (losses.aot_unpaired, 0.620957, LOG2),
}
WITH_REFERENCE = {
    name: (partial(fn, beta=0.1), golden, equal) for name, (fn, golden, equal) in (MARGIN | POINTWISE).items()
}
# name -> (loss, golden value, value where chosen and rejected are as likely and as long)
FREE = {
    "cpo": (partial(losses.cpo, beta=0.1), 0.474077, LOG2),
    "simpo": (partial(losses.simpo, beta=2.0, gamma=0.5), 0.011048, log(1 + exp(0.5))),
    "alphapo": (partial(losses.alphapo, beta=2.0, gamma=0.5, alpha=0.25), 3.811825e-06, log(1 + exp(0.5))),
    "orpo": (partial(losses.orpo, beta=1.0), 0.073119, LOG2),
}
NORMALISED = {"ipo", "dpo_norm", "simpo", "alphapo", "orpo"}
ALL = WITH_REFERENCE | FREE
COUPLED = {"aot", "aot_unpaired"}


B = 81  # one batch size nearly everywhere, so that each operation is compiled once


def evaluate(name, policy=POLICY, reference=REFERENCE, lengths=LENGTHS, **changes):
    """The loss of that name on (chosen, rejected) tuples of arrays, or of numbers for B equal pairs."""

    def array(x):
        return jnp.asarray(np.full(B, x) if np.ndim(x) == 0 else x)

    policy, reference, lengths = jax.tree.map(array, (policy, reference, lengths))
    given = dict(zip(("chosen_length", "rejected_length"), lengths)) if name in NORMALISED else {}
    return ALL[name][0](*policy, *(() if name in FREE else reference), **given, **changes)


def random_pairs(batch=B, seed=0):
    rng = np.random.default_rng(seed)
    lengths = tuple(rng.integers(1, 12, size=(2, batch)))
    policy = tuple(-n * rng.uniform(0.1, 2.0, size=batch) for n in lengths)
    return policy, tuple(p + rng.normal(size=batch) for p in policy), lengths


@pytest.mark.parametrize("name", ALL)
def test_golden_values(name):
    with jax.enable_x64(True):
        np.testing.assert_allclose(evaluate(name), ALL[name][1], rtol=0, atol=5.1e-7)
    np.testing.assert_allclose(evaluate(name), ALL[name][1], rtol=2e-6, atol=2e-6)  # float32


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_golden_values_of_the_divergences(divergence):
    fn, golden = DIVERGENCES[divergence]
    np.testing.assert_allclose(evaluate("dpo", divergence=fn), golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", MARGIN)
def test_a_policy_equal_to_its_reference(name, divergence):
    got = evaluate(name, reference=POLICY, divergence=DIVERGENCES[divergence][0])
    np.testing.assert_allclose(got, WITH_REFERENCE[name][2], rtol=1e-6)


@pytest.mark.parametrize("name", POINTWISE)
def test_a_policy_equal_to_its_reference_pointwise(name):
    np.testing.assert_allclose(evaluate(name, reference=POLICY), WITH_REFERENCE[name][2], rtol=1e-6)


@pytest.mark.parametrize("name", FREE)
def test_equally_likely_responses(name):
    got = evaluate(name, policy=(-20.0, -20.0), lengths=(8, 8))
    np.testing.assert_allclose(got, FREE[name][2], rtol=1e-6)


def test_limits_that_join_the_losses():
    policy, reference, lengths = random_pairs()
    pair = partial(evaluate, policy=policy, reference=reference, lengths=lengths)
    ones = (np.ones(B, int), np.ones(B, int))
    same = partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    same(losses.cdpo(*policy, *reference, beta=0.1, label_smoothing=0.0), pair("dpo"))
    same(losses.robust_dpo(*policy, *reference, beta=0.1, label_smoothing=0.0), pair("dpo"))
    same(pair("ipo", lengths=ones), pair("ipo_sum"))
    same(pair("dpo_norm", lengths=ones), pair("dpo"))
    same(pair("dpo", reference=(np.zeros(B), np.zeros(B))), pair("cpo"))
    free = {"beta": 2.0, "gamma": 0.5, "chosen_length": lengths[0], "rejected_length": lengths[1]}
    same(losses.alphapo(*policy, alpha=0.0, **free), losses.simpo(*policy, **free))
    same(losses.alphapo(*policy, alpha=1e-5, **free), losses.simpo(*policy, **free), rtol=1e-3)
    # tau towards 0: logistic below margin 0, exponential above
    margin = 0.1 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    got = losses.discopop(*policy, *reference, beta=0.1, tau=1e-4)
    want = np.where(margin > 0, np.exp(-margin), np.log1p(np.exp(-margin)))
    away = np.abs(margin) > 0.01
    same(np.asarray(got)[away], want[away], rtol=1e-4)


def test_divergences_are_increasing_maps_through_zero():
    u = np.linspace(-100.0, 100.0, B)
    middle = np.abs(u) < 25
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    want = {
        "reverse_kl": (u, 1 + 0 * u),
        "forward_kl": (-np.expm1(-u), np.exp(-u)),
        "js": (np.log(2 / (1 + np.exp(-u))), 1 / (1 + np.exp(u))),
        "alpha": (-2 * np.expm1(-u / 2), np.exp(-u / 2)),
    }
    for name, (fn, _) in DIVERGENCES.items():
        scores, slopes = jax.vmap(jax.value_and_grad(fn))(jnp.asarray(u))
        assert np.isfinite(scores).all() and (np.diff(scores) >= 0).all() and (np.asarray(slopes) >= 0).all()
        close(scores[B // 2], 0)
        close(np.asarray(scores)[middle], want[name][0][middle])
        close(np.asarray(slopes)[middle], want[name][1][middle])
    few = jnp.linspace(-20.0, 20.0, B)
    close(losses.alpha_divergence(few, alpha=0.0), losses.forward_kl(few))
    close(losses.alpha_divergence(few, alpha=1.0), few)
    close(losses.alpha_divergence(few, alpha=1 + 1e-6), few, rtol=1e-3)


def test_forward_kl_goes_on_as_a_tangent():
    slope = np.exp(30.0)
    far = np.linspace(-30.0, -2e4, B)
    scores, slopes = jax.vmap(jax.value_and_grad(losses.forward_kl))(jnp.asarray(far))
    np.testing.assert_allclose(scores, 1 - slope + slope * (far + 30), rtol=1e-5)
    np.testing.assert_allclose(slopes, slope, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_extreme_inputs_stay_finite(name):
    ends = np.array([-1e4, 0.0, 1e4], np.float32)
    grid = [np.ravel(x) for x in np.meshgrid(ends, ends, ends, ends)]
    lengths = (np.tile([0, 1, 500], 27), np.tile([7, 0, 1], 27))
    for divergence in [fn for fn, _ in DIVERGENCES.values()] if name in MARGIN else [None]:
        changes = {} if divergence is None else {"divergence": divergence}

        def total(policy, reference, changes=changes):
            loss = evaluate(name, policy, reference, lengths, **changes)
            return loss.sum(), loss

        (_, loss), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(tuple(grid[:2]), tuple(grid[2:]))
        assert np.isfinite(loss).all() and loss.shape == (B,)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    policy, reference, lengths = random_pairs(seed=1)
    fn = partial(evaluate, name, lengths=lengths)
    with jax.enable_x64(True):
        check_grads(fn, (policy,) if name in FREE else (policy, reference), order=1, modes="rev")


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_gradients_through_a_divergence(divergence):
    policy, reference, lengths = random_pairs(seed=1)
    fn = partial(evaluate, "dpo_norm", lengths=lengths, divergence=DIVERGENCES[divergence][0])
    with jax.enable_x64(True):
        check_grads(fn, (policy, reference), order=1, modes="rev")


@pytest.mark.parametrize("name", ALL)
def test_under_vmap(name):
    policy, reference, lengths = random_pairs()
    whole = evaluate(name, policy, reference, lengths)
    assert whole.shape == (B,) and whole.dtype == jnp.float32
    pairs = jax.tree.map(lambda x: jnp.asarray(x).reshape(9, 9), (policy, reference, lengths))
    mapped = jax.vmap(partial(evaluate, name))(*pairs)
    if name in COUPLED:
        whole = [evaluate(name, *jax.tree.map(lambda x, i=i: x[i], pairs)) for i in range(9)]
    np.testing.assert_allclose(mapped.ravel(), np.ravel(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_inputs_are_widened_first(name):
    policy, reference, lengths = random_pairs()
    narrow = [tuple(jnp.asarray(x, jnp.bfloat16) for x in pair) for pair in (policy, reference)]
    got = evaluate(name, *narrow, lengths)
    assert got.dtype == jnp.float32
    want = evaluate(name, *[tuple(x.astype(jnp.float32) for x in pair) for pair in narrow], lengths)
    np.testing.assert_array_equal(got, want)


def test_beta_may_be_traced():
    pair = [jnp.full(B, x) for x in POLICY + REFERENCE]
    np.testing.assert_allclose(jax.jit(losses.dpo)(*pair, beta=0.1), 0.620957, atol=1e-6)
    slope = jax.grad(lambda beta: losses.dpo(*pair, beta=beta).sum())(0.1)
    np.testing.assert_allclose(slope, -1.5 * B / (1 + np.exp(0.15)), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(NORMALISED))
def test_an_empty_completion_has_mean_zero(name):
    got = evaluate(name, policy=(0.0, -25.0), reference=(0.0, -24.5), lengths=(0, 5))
    want = evaluate(name, policy=(0.0, -25.0), reference=(0.0, -24.5), lengths=(1, 5))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orpo_at_the_ends_of_probability(dtype):
    ends = np.array([0.0, -1e-7, -1e-4, -20.0])
    m = tuple(jnp.asarray(np.resize(x, B), dtype) for x in np.meshgrid(ends, ends))
    ones = jnp.ones(B, int)

    def total(m):
        loss = losses.orpo(*m, beta=1.0, chosen_length=ones, rejected_length=ones)
        return loss.sum(), loss

    (_, loss), grads = jax.value_and_grad(total, has_aux=True)(m)

    def logit(x):
        x = np.minimum(np.asarray(x, np.float64), -(2.0**-24))
        return x - np.log(-np.expm1(x))

    np.testing.assert_allclose(loss, np.logaddexp(0, logit(m[1]) - logit(m[0])), rtol=1e-5, atol=1e-8)
    for x, g in zip(m, grads):
        assert np.isfinite(g).all() and (np.asarray(g)[np.asarray(x) == 0] == 0).all()


def test_cpo_and_orpo_add_the_nll_they_are_given():
    policy, _, (chosen_length, rejected_length) = random_pairs()
    nll = losses.sft(policy[0], chosen_length=chosen_length)
    np.testing.assert_allclose(nll, -policy[0] / chosen_length, rtol=1e-6)
    assert not np.signbit(losses.sft(jnp.zeros(1), chosen_length=jnp.zeros(1, int))).any()
    bare = losses.cpo(*policy, beta=0.1)
    np.testing.assert_allclose(losses.cpo(*policy, beta=0.1, chosen_nll=nll), bare + nll, rtol=1e-6)
    lengths = {"chosen_length": chosen_length, "rejected_length": rejected_length}
    bare = losses.orpo(*policy, beta=0.1, **lengths)
    np.testing.assert_allclose(losses.orpo(*policy, beta=0.1, chosen_nll=nll, **lengths), bare + nll, rtol=1e-6)


def test_tpo_is_a_preference_and_a_gold_response():
    policy, _, (chosen_length, rejected_length) = random_pairs()
    gold, gold_length = jnp.tile(jnp.array([-3.0, -8.0, 0.0]), B // 3), jnp.tile(jnp.array([3, 4, 0]), B // 3)
    nll = 0.5 * losses.sft(gold, chosen_length=gold_length)
    got = losses.tpo(*policy, gold, beta=0.1, alpha=0.5, gold_length=gold_length)
    np.testing.assert_allclose(got, losses.cpo(*policy, beta=0.1) + nll, rtol=1e-6)
    given = {"beta": 2.0, "gamma": 0.5, "chosen_length": chosen_length, "rejected_length": rejected_length}
    got = losses.tpo_l(*policy, gold, alpha=0.5, gold_length=gold_length, **given)
    np.testing.assert_allclose(got, losses.simpo(*policy, **given) + nll, rtol=1e-6)
    grad = jax.grad(lambda g: losses.tpo(*policy, g, beta=0.1, alpha=0.5, gold_length=gold_length).sum())(gold)
    np.testing.assert_allclose(grad[:3], [-0.5 / 3, -0.5 / 4, -0.5], rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_aot_is_sorted_and_keeps_each_rows_gradient(batch):
    policy, reference, _ = random_pairs(batch, seed=batch)
    args = [np.asarray(x, np.float32) for x in policy + reference]
    delta = np.sort(args[0] - args[1]) - np.sort(args[2] - args[3])
    want = np.logaddexp(0, -0.1 * delta)
    np.testing.assert_allclose(losses.aot(*args, beta=0.1), want, rtol=1e-6)
    a, b = args[0] - args[2], args[1] - args[3]
    want_unpaired = np.logaddexp(0, -0.1 * (np.sort(a) - np.sort(b)))
    np.testing.assert_allclose(losses.aot_unpaired(*args, beta=0.1), want_unpaired, rtol=1e-6)
    # the gradient of rank k belongs to the row that has it
    grad = jax.grad(lambda x: losses.aot(x, *args[1:], beta=0.1).sum())(args[0])
    rank = np.argsort(np.argsort(args[0] - args[1]))
    np.testing.assert_allclose(grad, (-0.1 / (1 + np.exp(0.1 * delta)))[rank], rtol=1e-5)
    # the order of the rows is nothing to it
    shuffled = [x[::-1] for x in args]
    np.testing.assert_allclose(losses.aot(*shuffled, beta=0.1), want, rtol=1e-6)


def test_aot_with_ties_has_finite_gradients():
    args = [jnp.full(B, x) for x in POLICY + REFERENCE]
    for fn in (losses.aot, losses.aot_unpaired):
        grads = jax.grad(lambda *xs, fn=fn: fn(*xs, beta=0.1).sum(), (0, 1, 2, 3))(*args)
        np.testing.assert_allclose(grads[0].sum(), B * -0.1 / (1 + np.exp(0.15)), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_a_bad_beta_is_refused(name, beta):
    with pytest.raises(ValueError, match=rf"expected beta positive and finite, found {beta}; 0.1 is usual"):
        evaluate(name, beta=beta)


BAD = [
    ("cdpo", {"label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\), found 0.5; .*swap chosen and rejected"),
    ("cdpo", {"label_smoothing": -0.1}, r"label_smoothing in \[0, 0.5\), found -0.1"),
    ("robust_dpo", {"label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\), found 0.5"),
    ("aot", {"label_smoothing": 0.7}, r"label_smoothing in \[0, 0.5\), found 0.7"),
    ("aot_unpaired", {"label_smoothing": 0.7}, r"label_smoothing in \[0, 0.5\), found 0.7"),
    ("exo", {"label_smoothing": 0.0}, r"label_smoothing in \(0, 0.5\), found 0.0; .*so 0 is refused"),
    ("discopop", {"tau": 0.0}, r"tau in \(0, 1\], found 0.0; 0.05"),
    ("discopop", {"tau": 1.5}, r"tau in \(0, 1\], found 1.5; 0.05"),
    ("simpo", {"gamma": -0.5}, "gamma at least 0 and finite, found -0.5"),
    ("alphapo", {"gamma": -0.5}, "gamma at least 0 and finite, found -0.5"),
    ("alphapo", {"alpha": float("inf")}, "alpha to be finite, found inf; 0 is SimPO"),
    ("dpo", {"divergence": partial(losses.alpha_divergence, alpha=float("nan"))}, "alpha to be finite, found nan"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=[f"{n}-{next(iter(c))}" for n, c, _ in BAD])
def test_bad_hyper_parameters_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(name, **changes)


def test_more_bad_input_is_refused():
    with pytest.raises(ValueError, match="alpha at least 0 and finite, found -1.0; it weighs the nll of the gold"):
        losses.tpo(*[jnp.zeros(1)] * 3, beta=0.1, alpha=-1.0, gold_length=jnp.ones(1))
    with pytest.raises(ValueError, match=r"all of one shape, found .*'policy_rejected': \(3, 1\).*seq_logprob"):
        losses.dpo(jnp.zeros(3), jnp.zeros((3, 1)), jnp.zeros(3), jnp.zeros(3), beta=0.1)
    with pytest.raises(ValueError, match=r"found .*'reference': \(3, 5\)"):
        losses.aot_unpaired(jnp.zeros(3), jnp.zeros(3), jnp.zeros((3, 5)), jnp.zeros(3), beta=0.1)
    with pytest.raises(ValueError, match=r"found .*'length': \(1,\)"):
        losses.sft(jnp.zeros(3), chosen_length=jnp.ones(1))
    with pytest.raises(ValueError, match=r"found .*'chosen_nll': \(\)"):
        losses.cpo(jnp.zeros(3), jnp.zeros(3), beta=0.1, chosen_nll=jnp.zeros(()))


@pytest.mark.parametrize("name", FREE)
def test_reference_free_losses_take_no_divergence(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'divergence'"):
        evaluate(name, divergence=losses.forward_kl)
