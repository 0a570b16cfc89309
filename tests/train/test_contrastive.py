"""Columns to vectors to a loss: masks of dropout, chunks, several lengths, and the global batch on a mesh."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import simcse
from jaxlm.models import encoder, pooling
from jaxlm.models.config import EncoderConfig
from jaxlm.models.spec import init
from jaxlm.recipes.simcse import contrast
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import shard_rows
from jaxlm.sharding.rules import param_shardings
from jaxlm.train.contrastive import encode_columns, make_contrastive_loss, make_encode

CFG = EncoderConfig(
    vocab_size=32, width=16, num_layers=1, num_heads=2, mlp_width=32, max_length=12, dropout=0.2, scan_layers=False
)
NAMES = ("query", "positive", "hard_0", "hard_1")
ROWS = 8


def forward(params, tokens, *, segments, key):
    return encoder.forward(params, tokens, cfg=CFG, segments=segments, key=key).hidden


ENCODE = make_encode(forward, lambda params, hidden, mask: pooling.mean(hidden, mask))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3 * x, init(jax.random.key(0), encoder.spec(CFG)))


@pytest.fixture(scope="module")
def batch():
    rng, found = np.random.default_rng(0), {}
    for name, length in zip(NAMES, (8, 8, 12, 12)):
        segments = (np.arange(length) < rng.integers(2, length + 1, (ROWS, 1))).astype(np.int32)
        found[f"{name}/tokens"] = rng.integers(1, 32, (ROWS, length)).astype(np.int32) * segments
        found[f"{name}/segments"] = segments
    return found


KEYS = jax.random.split(jax.random.key(1), ROWS)


@partial(jax.jit, static_argnames=("names", "chunk_size", "one_mask"))
def columns(params, batch, keys, names, chunk_size=None, one_mask=False):
    return encode_columns(ENCODE, params, batch, keys, names, chunk_size=chunk_size, one_mask=one_mask)


@pytest.mark.slow
def test_every_column_is_what_the_encoder_gives_for_it_alone(params, batch):
    found = columns(params, batch, None, NAMES)
    for name, vectors in zip(NAMES, found, strict=True):
        alone = ENCODE(params, {f: batch[f"{name}/{f}"] for f in ("tokens", "segments")}, None)
        np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_a_column_twice_has_two_masks_or_one(params, batch):
    first, second = columns(params, batch, KEYS, ("query", "query"))
    assert np.abs(first - second).max(axis=1).min() > 0.01
    first_of_one, second_of_one = columns(params, batch, KEYS, ("query", "query"), one_mask=True)
    np.testing.assert_allclose(first_of_one, second_of_one, atol=1e-6)
    np.testing.assert_allclose(first_of_one, first, atol=1e-6)
    a, b = columns(params, batch, None, ("query", "query"))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_chunks_change_nothing_with_dropout_on(params, batch):
    whole = columns(params, batch, KEYS, NAMES)
    for a, b in zip(whole, columns(params, batch, KEYS, NAMES, chunk_size=4), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="chunk_size=5 does not divide the 16 sentences"):
        columns(params, batch, KEYS, NAMES, chunk_size=5)


@pytest.mark.parametrize("negatives", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_mesh_has_the_negatives_of_the_whole_batch_and_its_gradient(params, batch, negatives):
    loss_fn = make_contrastive_loss(ENCODE, NAMES[: 2 + negatives], partial(contrast, loss=simcse))

    def mean(params, batch, keys):
        total, weight, _ = loss_fn(params, batch, keys)
        return total / weight

    want = jax.jit(jax.value_and_grad(mean))(params, batch, KEYS)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    placed = jax.device_put(params, param_shardings(encoder.spec(CFG), mesh))
    found = jax.jit(jax.value_and_grad(mean))(placed, shard_rows(batch, mesh), KEYS)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * scale)


@pytest.mark.slow
def test_a_further_loss_is_added_as_a_mean_and_the_metrics_say_both(params, batch):
    def more(params, batch, key):
        return jnp.float32(6), jnp.float32(3), {"further": (jnp.float32(6), jnp.float32(3))}

    objective = partial(contrast, loss=simcse)
    plain = make_contrastive_loss(ENCODE, NAMES[:2], objective)(params, batch, None)
    both = make_contrastive_loss(ENCODE, NAMES[:2], objective, more=more)(params, batch, None)
    assert plain[1] == both[1] == ROWS
    np.testing.assert_allclose(both[0], plain[0] + ROWS * 2, rtol=1e-6)
    assert {"loss", "further", "accuracy", "alignment", "uniformity"} == set(both[2])
