"""The enumerable language model of the DID recipe: rows, tables, and a short training run."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.analysis import did
from jaxlm.models import decoder
from jaxlm.recipes import did_language as language
from jaxlm.recipes.did_checks import Settings
from jaxlm.recipes.did_fit import Problem

LENGTH = 3


@pytest.fixture(scope="module")
def policies():
    keys = jax.random.split(jax.random.key(0))
    return [language.random_transformer(key, length=LENGTH) for key in keys]


def test_every_response_stands_on_the_row_of_its_index():
    responses = language.enumerate_responses(6)
    assert responses.shape == (4096, 6) and len(np.unique(responses, axis=0)) == 4096
    np.testing.assert_array_equal(responses @ 4 ** np.arange(5, -1, -1), np.arange(4096))


def test_rows_begin_with_the_begin_token_and_never_ask_for_it():
    rows, responses = language.enumerate_rows(LENGTH), language.enumerate_responses(LENGTH)
    assert (rows["inputs"][:, 0] == language.BEGIN).all() and rows["mask"].all()
    np.testing.assert_array_equal(rows["inputs"][:, 1:], responses[:, :-1])
    np.testing.assert_array_equal(rows["targets"], responses)


def test_a_table_is_the_product_of_next_token_probabilities(policies):
    cfg, params, response = language.model(LENGTH), policies[0], [2, 0, 3]
    read, expected = [language.BEGIN], 0.0
    for token in response:
        last = decoder.forward(params, jnp.array([read]), cfg=cfg).hidden[0, -1]
        expected += jax.nn.log_softmax(params["unembed"]["table"][: language.VOCAB] @ last)[token]
        read.append(token)
    np.testing.assert_allclose(language.log_table(params, length=LENGTH)[2 * 16 + 0 * 4 + 3], expected, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_the_probabilities_of_all_responses_sum_to_one(policies, shared):
    for params in policies:
        table = language.log_table(params, length=LENGTH, shared=shared)
        assert table.shape == (64,) and abs(np.exp(table).sum() - 1) < 1e-5


def test_shared_prefixes_give_the_same_table_and_the_same_gradient(policies):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)

    def weighted(params, shared):
        return weights @ language.log_table(params, length=LENGTH, shared=shared)

    values, grads = zip(*[jax.value_and_grad(partial(weighted, shared=s))(policies[0]) for s in (False, True)])
    np.testing.assert_allclose(*values, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *grads)
    assert not np.any(grads[0]["unembed"]["table"][language.BEGIN]) and np.any(grads[0]["unembed"]["table"][0])


def test_orpo_takes_means_over_the_tokens_of_a_response():
    orpo = language.objectives(LENGTH)[language.NAMES.index("orpo")]
    zero = jnp.zeros(1)
    mean = {name: np.log(p) for name, p in (("chosen", 0.6), ("rejected", 0.3))}
    odds = np.log(0.6 / 0.4) - np.log(0.3 / 0.7)
    found = orpo(jnp.array([LENGTH * mean["chosen"]]), jnp.array([LENGTH * mean["rejected"]]), zero, zero)
    np.testing.assert_allclose(found, -mean["chosen"] + np.log1p(np.exp(-odds)), rtol=1e-5)


@pytest.mark.slow
def test_on_a_short_run_only_dpo_reaches_the_target(policies):
    reference, target = (language.log_table(p, length=LENGTH) for p in policies)
    problem = Problem(reference, target, reference, did.optimal_rejected(target, reference, beta=language.BETA))
    train = partial(language.train, policies[0], problem, jax.random.key(1), length=LENGTH, num_steps=100)
    final = {}
    for i, name in enumerate(language.NAMES):
        policy, curve = train(i)
        assert curve.shape == (3,)
        np.testing.assert_allclose(curve[0], did.jsd(target, reference), rtol=1e-4)
        np.testing.assert_allclose(curve[-1], did.jsd(target, language.log_table(policy, length=LENGTH)), atol=1e-5)
        final[name] = float(curve[-1])
    dpo = final.pop("dpo")
    assert dpo < curve[0] / 10 and dpo < min(final.values()) / 10


def test_more_seeds_are_judged_and_other_sizes_are_not(monkeypatch):
    monkeypatch.setattr(language, "train", lambda params, *_, **__: (params, jnp.array([0.2, 0.2])))
    small = Settings(language_length=LENGTH, num_language_seeds=2)
    result = language.e10(small)
    assert [len(curves) for curves in result.series["curves"].values()] == [2] * 4
    ratios = [c for c in result.checks if "over DPO's" in c.name]
    assert len(ratios) == 2 and all(c.at_reference_only for c in ratios)
    monkeypatch.setattr(language, "log_table", lambda *_, **__: jnp.log(jnp.full(16, 1 / 16)))
    ratios = [c for c in language.e10(Settings(num_language_seeds=2)).checks if "over DPO's" in c.name]
    assert not any(c.passed or c.at_reference_only for c in ratios)
