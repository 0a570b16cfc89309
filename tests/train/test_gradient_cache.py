"""Encoding in chunks: values and gradients of the whole batch, dropout on, on a mesh, in the memory of a chunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import losses
from jaxlm.models import encoder, pooling
from jaxlm.models.encoder import EncoderConfig
from jaxlm.models.spec import init
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import shard_batch
from jaxlm.sharding.rules import param_shardings
from jaxlm.train.gradient_cache import in_chunks

CFG = EncoderConfig(vocab_size=32, width=16, num_layers=1, num_heads=2, mlp_width=32, max_length=8, dropout=0.2)


def encode(params, batch, keys):
    out = encoder.forward(params, batch["tokens"], cfg=CFG, segments=batch["segments"], key=keys)
    return pooling.mean(out.hidden, batch["segments"] != 0)


def make_batch(rows: int):
    rng = np.random.default_rng(0)
    segments = (np.arange(8) < rng.integers(2, 9, (rows, 1))).astype(np.int32)
    return {"tokens": rng.integers(1, 32, (rows, 8)).astype(np.int32) * segments, "segments": segments}


def make_loss(num_chunks: int):
    """Unsupervised SimCSE: every sentence twice, under two dropout keys, all others as negatives."""
    chunked = in_chunks(encode, num_chunks=num_chunks)

    def loss(params, batch, keys):
        first, second = (chunked(params, batch, jax.vmap(jax.random.fold_in, (0, None))(keys, i)) for i in (0, 1))
        return jnp.mean(losses.simcse(first, second))

    return loss


def inputs(rows: int):
    params = jax.tree.map(lambda x: 3 * x, init(jax.random.key(0), encoder.spec(CFG)))
    return params, make_batch(rows), jax.random.split(jax.random.key(1), rows)


@pytest.mark.parametrize("num_chunks", [2, pytest.param(32, marks=pytest.mark.slow)])
def test_chunks_give_the_gradient_of_the_whole(num_chunks):
    params, batch, keys = inputs(64)
    want = jax.jit(jax.value_and_grad(make_loss(1)))(params, batch, keys)
    found = jax.jit(jax.value_and_grad(make_loss(num_chunks)))(params, batch, keys)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(want[1]))
    assert scale > 0.01
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1))


@pytest.mark.slow
def test_a_batch_of_1024_in_chunks_of_32():
    params, batch, keys = inputs(1024)
    want = jax.jit(jax.grad(make_loss(1)))(params, batch, keys)
    found = jax.jit(jax.grad(make_loss(32)))(params, batch, keys)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_the_encoders_memory_is_that_of_a_chunk():
    """The encoder alone, with a linear loss: four times the rows in four times the chunks cost no more."""

    def temporaries(rows: int, num_chunks: int) -> int:
        params, batch, keys = inputs(rows)
        chunked = in_chunks(encode, num_chunks=num_chunks)
        step = jax.jit(jax.grad(lambda p, b, k: jnp.sum(chunked(p, b, k) ** 2)))
        return step.lower(params, batch, keys).compile().memory_analysis().temp_size_in_bytes

    one, four, whole = temporaries(64, 2), temporaries(256, 8), temporaries(256, 1)
    vectors = 256 * CFG.width * 4
    assert four - one < 8 * vectors and whole > 3 * four


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device():
    params, batch, keys = inputs(32)
    want = jax.jit(jax.value_and_grad(make_loss(1)))(params, batch, keys)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    placed = jax.device_put(params, param_shardings(encoder.spec(CFG), mesh))
    found = jax.jit(jax.value_and_grad(make_loss(4)))(placed, shard_batch(batch, mesh=mesh), keys)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="num_chunks: expected at least 1, found 0"):
        in_chunks(encode, num_chunks=0)
    with pytest.raises(ValueError, match="64 rows cannot be split into 3"):
        make_loss(3)(*inputs(64))
