"""What must hold for every encoder: padding on either side, packing, dropout by row, poolers, meshes, refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import encoder, hf_encoder, pooling
from jaxlm.models.encoder import EncoderConfig
from jaxlm.models.spec import init
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import make_constrain, shard_batch
from jaxlm.sharding.rules import param_shardings

BERT = EncoderConfig(vocab_size=32, width=16, num_layers=2, num_heads=4, mlp_width=24, max_length=12, head=True)
ROBERTA = dataclasses.replace(BERT, position_offset=2, num_token_types=1, head=False)
FAMILIES = {"bert": BERT, "roberta": ROBERTA, "distilbert": dataclasses.replace(BERT, num_token_types=0, head=False)}
POOLERS = (pooling.mean, pooling.first, pooling.last)


@pytest.fixture(params=FAMILIES)
def family(request) -> EncoderConfig:
    return FAMILIES[request.param]


def make_params(cfg):
    params = init(jax.random.key(0), encoder.spec(cfg))
    noise = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(jax.tree.leaves(params))]
    return jax.tree.map(lambda x, n: x + 0.3 * n, params, jax.tree.unflatten(jax.tree.structure(params), noise))


def sentence(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 31, length)


def alone(params, tokens, cfg):
    return encoder.forward(params, jnp.asarray(tokens)[None], cfg=cfg).hidden[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(family, side):
    params, tokens = make_params(family), sentence(5, 0)
    where = slice(0, 5) if side == "right" else slice(4, 9)
    row, mask = np.zeros((1, 9), int), np.zeros((1, 9), bool)
    row[0, where], mask[0, where] = tokens, True
    hidden = encoder.forward(params, jnp.asarray(row), cfg=family, segments=jnp.asarray(mask, jnp.int32)).hidden
    np.testing.assert_allclose(hidden[0, where], alone(params, tokens, family), atol=1e-5)
    whole, every = alone(params, tokens, family)[None], jnp.ones((1, 5), bool)
    for pool in POOLERS:
        np.testing.assert_allclose(pool(hidden, jnp.asarray(mask)), pool(whole, every), atol=1e-5)


def test_packing_changes_nothing(family):
    params, (a, b) = make_params(family), (sentence(5, 0), sentence(8, 1))
    row = jnp.asarray([*a, *b, 0])[None]
    segments = jnp.asarray([1] * 5 + [2] * 8 + [0])[None]
    hidden = encoder.forward(params, row, cfg=family, segments=segments).hidden[0]
    np.testing.assert_allclose(hidden[:5], alone(params, a, family), atol=1e-5)
    np.testing.assert_allclose(hidden[5:13], alone(params, b, family), atol=1e-5)


def test_every_token_sees_both_sides(family):
    params, tokens = make_params(family), sentence(6, 0)
    changed = tokens.copy()
    changed[3] = tokens[3] % 30 + 1
    moved = np.abs(alone(params, tokens, family) - alone(params, changed, family)).max(axis=1)
    assert (moved > 1e-4).all()


def test_a_prompt_outside_the_mask_is_read_and_not_pooled(family):
    """The prompt changes the states of the text, but its own states are in no vector, NaN included."""
    params = make_params(family)
    hidden = alone(params, [*sentence(3, 5), *sentence(4, 6)], family)[None]
    mask = jnp.arange(7)[None] >= 3
    poisoned = hidden.at[:, :3].set(jnp.nan)
    for pool in POOLERS:
        np.testing.assert_array_equal(pool(poisoned, mask), pool(hidden, mask))
    np.testing.assert_allclose(pooling.mean(hidden, mask), hidden[:, 3:].mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(pooling.first(hidden, mask), hidden[:, 3])
    gradient = jax.grad(lambda h: pooling.mean(h, mask).sum())(poisoned)
    np.testing.assert_array_equal(gradient[:, :3], 0)


def test_poolers_of_several_layers():
    params = make_params(BERT)
    out = encoder.forward(params, jnp.asarray(sentence(6, 0))[None], cfg=BERT, states=True)
    mask = jnp.ones((1, 6), bool)
    assert out.states.shape == (BERT.num_layers + 1, 1, 6, BERT.width)
    np.testing.assert_array_equal(out.states[-1], out.hidden)
    want = (out.states[1] + out.states[2]).mean(axis=1) / 2
    np.testing.assert_allclose(pooling.first_last_mean(out.states, mask), want, atol=1e-6)
    np.testing.assert_allclose(pooling.top_two_mean(out.states, mask), want, atol=1e-6)
    np.testing.assert_array_equal(pooling.mean(out.hidden, jnp.zeros((1, 6), bool)), 0)


def test_dropout_is_by_row_and_by_key():
    cfg = dataclasses.replace(BERT, dropout=0.3)
    params = make_params(cfg)
    tokens = jnp.stack([jnp.asarray(sentence(6, i)) for i in range(4)])
    keys = jax.random.split(jax.random.key(1), 4)
    whole = encoder.forward(params, tokens, cfg=cfg, key=keys).hidden
    half = encoder.forward(params, tokens[2:], cfg=cfg, key=keys[2:]).hidden
    np.testing.assert_allclose(half, whole[2:], atol=1e-5)
    again = encoder.forward(params, tokens, cfg=cfg, key=jax.random.split(jax.random.key(2), 4)).hidden
    still = encoder.forward(params, tokens, cfg=cfg).hidden
    assert np.abs(again - whole).max() > 0.1 and np.abs(still - whole).max() > 0.1


def test_scanning_equals_unrolling(family):
    params, tokens = make_params(family), jnp.asarray(sentence(6, 0))[None]
    unrolled = encoder.forward(params, tokens, cfg=dataclasses.replace(family, scan_layers=False)).hidden
    np.testing.assert_allclose(unrolled, encoder.forward(params, tokens, cfg=family).hidden, atol=1e-5)


def test_a_mesh_gives_the_numbers_of_one_device(family):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = make_params(family)
    tokens = jnp.stack([jnp.asarray(sentence(8, i)) for i in range(4)])

    def loss(params, tokens, constrain=encoder.identity):
        return jnp.sum(encoder.forward(params, tokens, cfg=family, constrain=constrain).hidden ** 2) / tokens.size

    want = jax.value_and_grad(loss)(params, tokens)
    placed = jax.device_put(params, param_shardings(encoder.spec(family), mesh))
    batch = shard_batch({"tokens": np.asarray(tokens)}, mesh=mesh)["tokens"]
    constrain = make_constrain(mesh)
    found = jax.jit(jax.value_and_grad(lambda p, t: loss(p, t, constrain)))(placed, batch)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: encoder.forward(p, jnp.ones(3, int), cfg=BERT), r"tokens must be \[B, T\]"),
        (lambda p: encoder.forward(p, jnp.ones((1, 13), int), cfg=BERT), "13 tokens a row, but learned positions end"),
        (
            lambda p: encoder.forward(p, jnp.ones((1, 3), int), cfg=BERT, segments=jnp.ones((1, 2), int)),
            r"segments must have the shape of tokens, \(1, 3\); found \(1, 2\)",
        ),
        (
            lambda p: encoder.forward(
                p, jnp.ones((1, 3), int), cfg=FAMILIES["distilbert"], token_types=jnp.ones((1, 3), int)
            ),
            "the encoder has none",
        ),
        (lambda p: dataclasses.replace(BERT, num_heads=3), "width=16 must be a multiple of num_heads=3"),
        (lambda p: dataclasses.replace(BERT, dropout=1.0), r"dropout must be in \[0, 1\), found 1.0"),
        (lambda p: hf_encoder.read_config({"model_type": "gpt2"}), "'gpt2' is no encoder; expected one of bert"),
        (lambda p: hf_encoder.save("x", p, BERT, family="distilbert"), "has no tensors for head/bias"),
        (lambda p: hf_encoder.load("nowhere"), "no config.json"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_params(BERT))
