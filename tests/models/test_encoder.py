"""What must hold for every encoder: padding on either side, packing, dropout by row, poolers, meshes, refusals."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import encoder, hf_encoder, pooling
from jaxlm.models.config import RopeConfig
from jaxlm.models.encoder import EncoderConfig
from jaxlm.models.spec import init
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import make_constrain, shard_batch
from jaxlm.sharding.rules import param_shardings

BERT = EncoderConfig(vocab_size=32, width=16, num_layers=2, num_heads=4, mlp_width=24, max_length=12, head=True)
ROBERTA = dataclasses.replace(BERT, position_offset=2, num_token_types=1, head=False)
DISTILBERT = dataclasses.replace(BERT, num_token_types=0, head=False)
MODERNBERT = dataclasses.replace(
    DISTILBERT, num_layers=3, norm_placement="pre", norm_bias=False, attention_bias=False, mlp_bias=False,
    mlp_gated=True, rope=RopeConfig(500.0), rope_local=RopeConfig(20.0), layer_pattern=("global", "local"), window=3,
)  # fmt: skip
FAMILIES = {"bert": BERT, "roberta": ROBERTA, "distilbert": DISTILBERT, "modernbert": MODERNBERT}
POOLERS = (pooling.mean, pooling.first, pooling.last)
forward = jax.jit(encoder.forward, static_argnames=("cfg", "states", "constrain"))


@pytest.fixture(params=FAMILIES)
def family(request) -> EncoderConfig:
    return FAMILIES[request.param]


@functools.cache
def make_params(cfg):
    params = init(jax.random.key(0), encoder.spec(cfg))
    noise = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(jax.tree.leaves(params))]
    return jax.tree.map(lambda x, n: x + 0.3 * n, params, jax.tree.unflatten(jax.tree.structure(params), noise))


def read_modern(**changes):
    """The config that an early ModernBERT checkpoint carries, changed."""
    plain = dict(
        model_type="modernbert", vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=12, position_embedding_type="absolute", hidden_activation="gelu",
        norm_eps=1e-12, global_attn_every_n_layers=2, local_attention=4, global_rope_theta=500.0, local_rope_theta=20.0,
    )  # fmt: skip
    return hf_encoder.read_config(plain | changes)


def write_modern(cfg):
    return hf_encoder.write_config(cfg, "modernbert", "float32")


def sentence(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 31, length)


def alone(params, tokens, cfg):
    return forward(params, jnp.asarray(tokens)[None], cfg=cfg).hidden[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(family, side):
    params, tokens = make_params(family), sentence(5, 0)
    where = slice(0, 5) if side == "right" else slice(4, 9)
    row, mask = np.zeros((1, 9), int), np.zeros((1, 9), bool)
    row[0, where], mask[0, where] = tokens, True
    hidden = forward(params, jnp.asarray(row), cfg=family, segments=jnp.asarray(mask, jnp.int32)).hidden
    np.testing.assert_allclose(hidden[0, where], alone(params, tokens, family), atol=1e-5)
    whole, every = alone(params, tokens, family)[None], jnp.ones((1, 5), bool)
    for pool in POOLERS:
        np.testing.assert_allclose(pool(hidden, jnp.asarray(mask)), pool(whole, every), atol=1e-5)


def test_packing_changes_nothing(family):
    params, (a, b) = make_params(family), (sentence(5, 0), sentence(8, 1))
    row = jnp.asarray([*a, *b, 0])[None]
    segments = jnp.asarray([1] * 5 + [2] * 8 + [0])[None]
    hidden = forward(params, row, cfg=family, segments=segments).hidden[0]
    np.testing.assert_allclose(hidden[:5], alone(params, a, family), atol=1e-5)
    np.testing.assert_allclose(hidden[5:13], alone(params, b, family), atol=1e-5)


def test_every_token_sees_both_sides(family):
    params, tokens = make_params(family), sentence(6, 0)
    changed = tokens.copy()
    changed[3] = tokens[3] % 30 + 1
    moved = np.abs(alone(params, tokens, family) - alone(params, changed, family)).max(axis=1)
    assert (moved > 1e-4).all()


def test_a_local_layer_sees_the_window_on_both_sides_and_no_further():
    cfg = dataclasses.replace(MODERNBERT, num_layers=2, layer_pattern=("local",), window=3)
    params, tokens = make_params(cfg), sentence(12, 0)
    changed = tokens.copy()
    changed[5] = tokens[5] % 30 + 1
    moved = np.abs(alone(params, tokens, cfg) - alone(params, changed, cfg)).max(axis=1) > 1e-4
    np.testing.assert_array_equal(moved, np.abs(np.arange(12) - 5) <= 2 * 2)  # two tokens a layer, each side


def test_a_rotary_encoder_reads_rows_longer_than_it_was_made_for():
    assert alone(make_params(MODERNBERT), sentence(13, 0), MODERNBERT).shape == (13, MODERNBERT.width)


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
    out = forward(params, jnp.asarray(sentence(6, 0))[None], cfg=BERT, states=True)
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
    whole = forward(params, tokens, cfg=cfg, key=keys).hidden
    half = forward(params, tokens[2:], cfg=cfg, key=keys[2:]).hidden
    np.testing.assert_allclose(half, whole[2:], atol=1e-5)
    again = forward(params, tokens, cfg=cfg, key=jax.random.split(jax.random.key(2), 4)).hidden
    still = forward(params, tokens, cfg=cfg).hidden
    assert np.abs(again - whole).max() > 0.1 and np.abs(still - whole).max() > 0.1


def test_scanning_equals_unrolling(family):
    params, tokens = make_params(family), jnp.asarray(sentence(6, 0))[None]
    unrolled = forward(params, tokens, cfg=dataclasses.replace(family, scan_layers=False)).hidden
    np.testing.assert_allclose(unrolled, forward(params, tokens, cfg=family).hidden, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("modernbert", "roberta", "distilbert"))],
    indirect=True,
)  # fmt: skip
def test_a_mesh_gives_the_numbers_of_one_device(family):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = make_params(family)
    tokens = jnp.stack([jnp.asarray(sentence(8, i)) for i in range(4)])

    def loss(params, tokens, constrain=encoder.identity):
        return jnp.sum(forward(params, tokens, cfg=family, constrain=constrain).hidden ** 2) / tokens.size

    want = jax.value_and_grad(loss)(params, tokens)
    placed = jax.device_put(params, param_shardings(encoder.spec(family), mesh))
    batch = shard_batch({"tokens": np.asarray(tokens)}, mesh=mesh)["tokens"]
    constrain = make_constrain(mesh)
    found = jax.jit(jax.value_and_grad(lambda p, t: loss(p, t, constrain)))(placed, batch)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_two_generations_of_modernberts_config_mean_the_same():
    family, cfg = read_modern()
    assert family == "modernbert" and cfg == MODERNBERT
    written = write_modern(cfg)
    assert written["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    older = {k: v for k, v in written.items() if k not in ("layer_types", "rope_parameters")}
    newer = {k: v for k, v in written.items() if not k.startswith("global") and k != "local_rope_theta"}
    assert hf_encoder.read_config(older) == hf_encoder.read_config(newer) == (family, cfg)
    assert read_modern(local_rope_theta=None)[1].rope_local is None  # as the global layers


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
        (lambda p: dataclasses.replace(MODERNBERT, num_layers=1), "'pre' needs num_layers of at least 2, found 1"),
        (lambda p: dataclasses.replace(MODERNBERT, window=None), "local layers need a window"),
        (lambda p: dataclasses.replace(ROBERTA, rope=RopeConfig()), "position_offset=2 is of learned positions"),
        (lambda p: read_modern(rope_scaling={"type": "linear"}), "rope_scaling={'type': 'linear'} is not supported"),
        (
            lambda p: read_modern(rope_parameters={"sliding_attention": {"rope_type": "yarn"}}),
            "sliding_attention has rope_type='yarn'; for encoders only 'default'",
        ),
        (lambda p: read_modern(layer_types=["full_attention"]), "layer_types must be 3 of .*; found 1 of them"),
        (lambda p: read_modern(layer_types=["chunked"] * 3), "layer_types must be 3 of .*; found chunked"),
        (lambda p: read_modern(head_dim=3), "head_dim=3 must be hidden_size / num_attention_heads"),
        (lambda p: read_modern(hidden_activation="relu"), "the activation 'relu' is not supported"),
        (
            lambda p: write_modern(dataclasses.replace(MODERNBERT, norm_placement="post")),
            "'modernbert' cannot express norm_placement='post'",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_params(BERT))
