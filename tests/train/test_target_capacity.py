"""Scoring only the positions that are predicted gives what scoring all of them gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.train.objectives import make_hidden_scorer

ROWS, LENGTH, WIDTH, VOCAB = 3, 16, 8, 40
OUTPUTS = ("logprob", "entropy", "logsumexp")


def problem(targets_per_row):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"table": jax.random.normal(keys[0], (VOCAB, WIDTH)), "mix": jax.random.normal(keys[1], (WIDTH, WIDTH))}
    mask = np.zeros((ROWS, LENGTH), bool)
    rng = np.random.default_rng(0)
    for row, n in zip(mask, targets_per_row):
        row[rng.choice(LENGTH, n, replace=False)] = True
    batch = {
        "inputs": jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB),
        "targets": jax.random.randint(keys[3], (ROWS, LENGTH), 0, VOCAB),
        "mask": jnp.asarray(mask),
    }
    return params, batch


def apply(params, tokens, *, positions, segments, key):
    return jnp.tanh(params["table"][tokens] @ params["mix"])


def head(params):
    return {"unembed": params["table"]}


@pytest.mark.parametrize(
    "counts", [(5, 0, 3), *(pytest.param(c, marks=pytest.mark.slow) for c in ((6, 6, 6), (1, 2, 6)))]
)
def test_values_and_gradients_are_those_of_all_positions(counts):
    params, batch = problem(counts)

    def total(params, capacity):
        stats = make_hidden_scorer(apply, head, capacity=capacity)(params, batch, None, OUTPUTS)
        weights = jnp.arange(ROWS * LENGTH, dtype=jnp.float32).reshape(ROWS, LENGTH)
        return sum(jnp.sum(weights * x) for x in jax.tree.leaves(stats)), stats

    (value, stats), gradient = jax.value_and_grad(total, has_aux=True)(params, None)
    (compact_value, compact), compact_gradient = jax.value_and_grad(total, has_aux=True)(params, 6)
    np.testing.assert_allclose(compact_value, value, rtol=1e-6)
    for got, expected in zip(jax.tree.leaves((compact, compact_gradient)), jax.tree.leaves((stats, gradient))):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_a_row_with_more_targets_than_the_capacity_is_never_cut_in_silence():
    params, batch = problem((7, 2, 6))
    stats = make_hidden_scorer(apply, head, capacity=6)(params, batch, None, ("logprob",))
    assert np.isnan(stats.logprob[0]).sum() == 1
    assert np.isfinite(stats.logprob[1:]).all()


def test_fewer_positions_meet_the_vocabulary():
    params, batch = problem((5, 0, 3))

    def products(capacity):
        score = make_hidden_scorer(apply, head, capacity=capacity)
        compiled = jax.jit(lambda p: score(p, batch, None, ("logprob",)).logprob).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    assert products(6) < products(None)
