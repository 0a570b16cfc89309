"""Preference training: micro-batches, empty rows, the first loss, references and what has a gradient."""

from __future__ import annotations

import functools
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.models import lora
from jaxlm.models import spec as specs
from jaxlm.models.layers import project
from jaxlm.models.spec import Param, flatten, normal
from jaxlm.ops.masks import attention_mask
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.preference import (
    TOKENS,
    frozen_alone,
    make_preference_eval,
    make_preference_loss,
    make_scorer,
    policy_alone,
)
from jaxlm.train.reference import make_score_step
from jaxlm.train.state import new_state
from jaxlm.train.step import make_train_step

SETUP = runpy.run_path(str(Path(__file__).with_name("preference_setup.py")))
params_of, data_of, packed, term_of, objective_of = (
    SETUP[name] for name in ("params_of", "data_of", "packed", "term_of", "objective_of")
)

SMALL = {name: {"table": Param((259, 16), ("vocab", "embed"), normal(1.0))} for name in ("embed", "unembed")} | {
    name: {"kernel": Param((16, 16), ("embed", "head_dim"), normal(1.0))} for name in ("q", "k", "v")
}


def small_apply(params, tokens, *, positions, segments, key):
    """One layer of attention: a model that compiles in no time, for what needs its gradients."""
    x = params["embed"]["table"][tokens]
    q, k, v = (project(params[name], x) for name in ("q", "k", "v"))
    mask = attention_mask(positions, positions, segments, segments)
    return jnp.tanh(x + jax.nn.softmax(jnp.where(mask, q @ k.swapaxes(1, 2), -1e9)) @ v)


SMALL_SCORE = make_hidden_scorer(small_apply, lambda params: {"unembed": params["unembed"]["table"]})


@functools.cache
def steps_of(num_microbatches: int):
    """Metrics of two steps of plain descent on batches of 4 ragged rows, and the parameters after them."""
    data = data_of(n=40)
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    loss = make_preference_loss(scorer, objective_of(term_of("dpo")), reference=frozen_alone)
    optimizer = optax.sgd(0.3)
    step = jax.jit(make_train_step(loss, optimizer, seed=0, num_microbatches=num_microbatches))
    state = new_state(params_of(0, SMALL), optimizer).replace(frozen=params_of(1, SMALL))
    lines = []
    for i in range(2):
        batch = data.train.batch(i)
        assert len(set(batch["segments"].max(axis=1).tolist())) > 1  # rows weigh differently
        state, metrics = step(state, batch)
        lines.append({n: float(t) / (1.0 if w is None else float(w)) for n, (t, w) in metrics.items()})
    return lines, state.params


COUNTS = {"tokens", "pairs"}
"""Of a whole step."""


@pytest.mark.parametrize("k", [2, 4])
def test_micro_batches_equal_one_batch(k):
    (lines, params), (one, expected) = steps_of(k), steps_of(1)
    for got, want in zip(lines, one, strict=True):
        for name in want.keys() - COUNTS:
            assert got[name] == pytest.approx(want[name], rel=2e-6, abs=1e-6), name
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, params_of(0, SMALL))
    assert min(jax.tree.leaves(moved)) > 1e-3  # every parameter was trained
    for path, x in flatten(expected).items():
        np.testing.assert_allclose(flatten(params)[path], x, atol=1e-6, rtol=0, err_msg=path)


def test_counts_do_not_depend_on_micro_batches():
    got, want = steps_of(4)[0][0], steps_of(1)[0][0]
    assert {name: got[name] for name in COUNTS} == {name: want[name] for name in COUNTS}


def test_an_empty_row_weighs_nothing_through_the_model(packed):
    """Value and every gradient: wherever it stands, and where there is nothing else."""
    data, batch, _, _, _ = packed
    assert (batch["segments"][-1] == 0).all()
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    loss = make_preference_loss(scorer, objective_of(term_of("dpo"), term_of("simpo")), reference=frozen_alone)
    frozen = params_of(1, SMALL)

    @jax.jit
    def value_and_grad(batch):
        return jax.value_and_grad(lambda p: loss(p, batch, None, frozen=frozen)[:2], has_aux=True)(params_of(0, SMALL))

    (nothing, weight), grads = value_and_grad(jax.tree.map(lambda x: np.stack([x[-1]] * len(x)), batch))
    assert nothing == 0 and weight == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)
    (total, weight), grads = value_and_grad(batch)
    (moved, _), moved_grads = value_and_grad(jax.tree.map(lambda x: np.concatenate([x[-1:], x[:-1]]), batch))
    assert weight == 9
    np.testing.assert_allclose(moved, total, rtol=1e-6)
    for path, g in flatten(grads).items():
        assert np.isfinite(g).all() and float(jnp.abs(g).max()) > 0.01
        np.testing.assert_allclose(flatten(moved_grads)[path], g, atol=1e-5, err_msg=path)


LORA = lora.LoraConfig(rank=2)


def with_adapters(adapters, base):
    return lora.join(base, adapters, LORA)


REFERENCES = {  # adapters, policy, reference (None: cached in the batch)
    "cached": (False, policy_alone, None),
    "live": (False, policy_alone, frozen_alone),
    "lora cached": (True, with_adapters, None),
    "lora live": (True, with_adapters, frozen_alone),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_first_loss_is_log_2(packed, kind):
    data, batch, _, _, _ = packed
    adapted, policy, reference = REFERENCES[kind]
    base = params_of(0, SMALL)
    trained = specs.init(jax.random.key(3), lora.lora_spec(SMALL, LORA)) if adapted else base
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    score = make_score_step(scorer, make_mesh(MeshConfig(), jax.devices()[:1]))
    tokens = {name: batch[name] for name in TOKENS}
    given = batch if reference else dict(batch, reference=np.asarray(score(base, tokens).logprob))
    objective = objective_of(term_of("dpo"))
    metrics = make_preference_eval(score, objective, policy=policy, reference=reference)((trained, base), given)
    value = {name: float(t) / (1.0 if w is None else float(w)) for name, (t, w) in metrics.items()}
    for name in ("margins", "rewards_chosen", "rewards_rejected", "displacement_chosen", "displacement_rejected"):
        assert value[name] == 0.0, name
    assert value["accuracies"] == value["ordered"] == 0.0
    assert value["loss"] == pytest.approx(math.log(2), abs=6e-8)  # the sum of 9 equal numbers is rounded

    loss = make_preference_loss(scorer, objective, policy=policy, reference=reference)
    first = jax.jit(jax.value_and_grad(lambda p: loss(p, given, None, frozen=base)[:2], has_aux=True))
    (total, weight), grads = first(trained)
    assert float(total / weight) == pytest.approx(math.log(2), abs=1e-6)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3


def test_a_reference_passes_no_gradient(packed):
    """Where policy and reference are the very same parameters, only the policy's side is differentiated."""
    data, batch, _, _, _ = packed
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    live = make_preference_loss(scorer, objective_of(term_of("dpo")), reference=policy_alone)
    cached = make_preference_loss(scorer, objective_of(term_of("dpo")))
    params = params_of(0, SMALL)
    given = dict(batch, reference=jax.jit(scorer)(params, batch, None).logprob)
    grads = [jax.jit(jax.grad(lambda p, f=f: f(p, given, None)[0]))(params) for f in (live, cached)]
    for path, g in flatten(grads[0]).items():
        np.testing.assert_allclose(flatten(grads[1])[path], g, atol=1e-5, err_msg=path)
        assert float(jnp.abs(g).max()) > 0.01
