"""One step: what is skipped, what is averaged, what decays, and models that other people wrote."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.models.spec import Param, decay_mask, init, normal, ones
from jaxlm.train import chips, flops
from jaxlm.train.objectives import make_logits_nll, make_next_token_loss
from jaxlm.train.optim import OptimConfig, make_optimizer, make_schedule, muon_dimensions
from jaxlm.train.state import new_state
from jaxlm.train.step import make_eval_step, make_train_step, split_rows

SPEC = {
    "embed": {"table": Param((16, 8), ("vocab", "embed"), normal(0.5))},
    "layers": {"up": {"kernel": Param((2, 8, 8), ("layers", "embed", "mlp"), normal(0.5))}},
    "norm": {"scale": Param((8,), (None,), ones, decay=False)},
}


def logits(params, tokens, *, positions=None, segments=None, key=None):
    x = params["embed"]["table"][tokens]
    for kernel in params["layers"]["up"]["kernel"]:
        x = jnp.tanh(x @ kernel)
    return (x * params["norm"]["scale"]) @ params["embed"]["table"].T


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 16, (4, 9)).astype(np.int32)
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "mask": jnp.ones((4, 8), bool),
    }


def setup(optim=None, **settings):
    optimizer, schedule = make_optimizer(
        optim or OptimConfig(learning_rate=1e-2, schedule="constant"),
        num_steps=50,
        decay_mask=decay_mask(SPEC),
        spec=SPEC,
    )
    loss_fn = make_next_token_loss(make_logits_nll(logits))
    state = new_state(init(jax.random.key(0), SPEC), optimizer, ema="ema_decay" in settings)
    return jax.jit(make_train_step(loss_fn, optimizer, seed=0, schedule=schedule, **settings)), state


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_every_optimizer_learns_a_batch(name):
    step, state = setup(OptimConfig(name=name, learning_rate=2e-2, schedule="constant", weight_decay=0.01))
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 40 and int(state.num_skipped) == 0


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    step, state = setup(ema_decay=0.5)
    state, _ = step(state, batch())
    bad = dict(batch(), mask=jnp.zeros((4, 8), bool))
    poisoned = state.replace(params=jax.tree.map(lambda x: x, state.params))
    poisoned.params["norm"]["scale"] = poisoned.params["norm"]["scale"].at[0].set(jnp.nan)
    for before, given in ((state, bad), (poisoned, batch())):
        after, metrics = step(before, given)
        for name in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
        assert float(metrics["skipped"][0]) == 1
        assert [float(x) for x in metrics["loss"]] == [0, 0]
        assert (int(after.step), int(after.num_skipped), int(after.num_skipped_in_a_row)) == (2, 1, 1)
    again, _ = step(after, batch())
    assert int(again.num_skipped_in_a_row) == 2  # the parameters are still poisoned
    good, metrics = step(state.replace(num_skipped=jnp.int32(3), num_skipped_in_a_row=jnp.int32(2)), batch())
    assert (int(good.num_skipped), int(good.num_skipped_in_a_row), float(metrics["skipped"][0])) == (3, 0, 0)


def test_the_average_follows_its_formula():
    step, state = setup(ema_decay=0.9)
    expected = np.asarray(state.params["embed"]["table"], np.float64)
    for i in range(5):
        state, _ = step(state, batch(i))
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["embed"]["table"], np.float64)
    np.testing.assert_allclose(state.ema["embed"]["table"], expected, rtol=1e-5)


def test_adamw_decays_matrices_and_spares_the_rest():
    settings = dict(learning_rate=0.1, schedule="constant", clip_norm=None)
    zero = jax.tree.map(jnp.zeros_like, init(jax.random.key(0), SPEC))
    params = init(jax.random.key(0), SPEC)
    optimizer, _ = make_optimizer(OptimConfig(weight_decay=0.5, **settings), num_steps=5, decay_mask=decay_mask(SPEC))
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embed"]["table"], -0.05 * params["embed"]["table"], rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)


def test_muon_makes_every_layers_update_orthogonal():
    dimensions = muon_dimensions(SPEC)
    assert dimensions["embed"]["table"] is None and dimensions["norm"]["scale"] is None
    assert dimensions["layers"]["up"]["kernel"] == optax.contrib.MuonDimensionNumbers((1,), (2,))
    optim = OptimConfig(name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=None)
    optimizer, _ = make_optimizer(optim, num_steps=5, decay_mask=decay_mask(SPEC), spec=SPEC)
    params = init(jax.random.key(0), SPEC)
    grads = init(jax.random.key(1), SPEC)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for update in updates["layers"]["up"]["kernel"]:
        singular = np.linalg.svd(np.asarray(update), compute_uv=False)
        # Five Newton-Schulz steps leave singular values between about 0.7 and 1.2 of their common scale.
        assert singular.max() / singular.min() < 2
    with pytest.raises(ValueError, match="optim.name='muon' needs the model's spec"):
        make_optimizer(optim, num_steps=5, decay_mask=decay_mask(SPEC))


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("constant", {0: 0.2, 3: 0.8, 4: 1.0, 19: 1.0}),
        ("linear", {4: 1.0, 12: 0.55, 20: 0.1}),
        ("cosine", {4: 1.0, 12: 0.55, 20: 0.1}),
        ("wsd", {4: 1.0, 16: 1.0, 18: 0.55, 20: 0.1}),
    ],
)
def test_schedules_at_their_corners(name, golden):
    schedule = make_schedule(OptimConfig(learning_rate=1.0, schedule=name, warmup_steps=4), num_steps=20)
    for step, rate in golden.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, err_msg=f"step {step}")


def test_a_warm_up_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match="optim.warmup_steps=30 must lie within the 20 steps"):
        make_schedule(OptimConfig(warmup_steps=30), num_steps=20)


def test_a_linen_module_of_someone_else_trains():
    class Theirs(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(16)(nn.tanh(nn.Dense(32)(nn.Embed(16, 8)(tokens))))

    module, first = Theirs(), batch()
    params = module.init(jax.random.key(0), first["inputs"])["params"]

    def apply(params, tokens, *, positions, segments, key):
        return module.apply({"params": params}, tokens)

    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(make_next_token_loss(make_logits_nll(apply)), optimizer, seed=0))
    state = new_state(params, optimizer)
    losses = []
    for _ in range(30):
        state, metrics = step(state, first)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < losses[0] - 0.5


def test_metrics_are_sums_that_divide_to_the_plain_means():
    params = init(jax.random.key(0), SPEC)
    given = dict(batch(), mask=jnp.arange(8) < 5 * jnp.ones((4, 1)), target_bytes=jnp.full((4, 8), 3))
    metrics = make_eval_step(make_next_token_loss(make_logits_nll(logits), z_loss=0.1))(params, given)
    logp = np.asarray(jax.nn.log_softmax(logits(params, given["inputs"])), np.float64)
    nll = -np.take_along_axis(logp, np.asarray(given["targets"])[..., None], -1)[:, :5, 0].sum()
    entropy = -(np.exp(logp) * logp).sum(-1)[:, :5].sum()
    lse = np.asarray(jax.nn.logsumexp(logits(params, given["inputs"]), axis=-1), np.float64)[:, :5]
    for name, (total, weight) in {
        "loss": (nll, 20), "entropy": (entropy, 20), "bits_per_byte": (nll / np.log(2), 60),
        "z_loss": (0.1 * (lse**2).sum(), 20), "tokens": (20, 1),
    }.items():  # fmt: skip
        np.testing.assert_allclose([float(x) for x in metrics[name]], [total, weight], rtol=1e-5, err_msg=name)


def test_rows_are_dealt_out_to_micro_batches():
    np.testing.assert_array_equal(split_rows(jnp.arange(6), 3), [[0, 3], [1, 4], [2, 5]])
    with pytest.raises(ValueError, match="6 rows cannot be split into 4 micro-batches"):
        split_rows(jnp.arange(6), 4)


def test_flops_by_hand_and_peaks():
    assert flops.matmul_parameters(SPEC) == 2 * 64 + 16 * 8
    got = flops.flops_per_token(SPEC, sequence_length=10, num_layers=2, num_heads=3, head_dim=4)
    assert got == 6 * (2 * 64 + 16 * 8) + 6 * 2 * 3 * 4 * 10
    assert chips.peak_flops(jax.devices()[0]) is None
