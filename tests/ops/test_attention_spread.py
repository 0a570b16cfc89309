"""Rows split over devices: the numbers of one device, and no collective inside a loop."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.ops.attention import attention, spread
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import make_constrain, shard_batch

LENGTH = 1024
MORE = (dict(tensor=2, sequence=4), dict(data=2, sequence=2))
MESHES = [dict(fsdp=2, sequence=4), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE)]


def operands(rows=2, heads=4, kv_heads=2, dim=8):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, LENGTH, n, dim)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.repeat(rng.integers(1, 4, size=(rows, 8)).cumsum(axis=1), LENGTH // 8, axis=1).astype(np.int32)
    segments[1, 900:] = 0
    return q, k, v, jnp.asarray(segments), jnp.broadcast_to(jnp.arange(LENGTH), (rows, LENGTH))


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"soft_cap": 2.0, "packed": True}], ids=str)
def test_values_and_gradients_are_those_of_one_device(config, options):
    mesh = make_mesh(MeshConfig(**{"data": 1} | config), devices=jax.devices()[: int(np.prod([*config.values()]))])
    constrain, options = make_constrain(mesh), dict(options)
    q, k, v, segments, positions = operands()
    packed = segments if options.pop("packed", False) else None
    where = dict(q_positions=positions, k_positions=positions, q_segments=packed, k_segments=packed, scale=0.4)

    def run(split, q, k, v):
        if split:
            q, k, v = (constrain(x, ("batch", "length", "act_heads", None)) for x in (q, k, v))
            parts = spread.parts_of(constrain)
            out = spread.attention(attention, q, k, v, parts=parts, constrain=constrain, **where, **options)
        else:
            out = attention(q, k, v, implementation="reference", **where, **options)
        return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(LENGTH))[:, None, None]), out

    found, want = (
        jax.jit(jax.value_and_grad(partial(run, split), (0, 1, 2), has_aux=True))(q, k, v) for split in (True, False)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, want)


def test_a_decoder_takes_it_and_no_loop_talks_to_another_device():
    cfg = DecoderConfig(
        vocab_size=64, width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64, max_length=LENGTH,
        scan_layers=False,
    )  # fmt: skip
    params = specs.init(jax.random.key(0), decoder.spec(cfg))
    tokens = np.asarray(np.random.default_rng(1).integers(0, 64, (2, LENGTH)), np.int32)
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=4))
    batch = shard_batch({"tokens": tokens}, mesh)

    def loss(params, tokens, constrain):
        return jnp.sum(jnp.sin(decoder.forward(params, tokens, cfg=cfg, constrain=constrain).hidden))

    split = jax.jit(jax.grad(partial(loss, constrain=make_constrain(mesh))))
    found = split(params, batch["tokens"])
    want = jax.jit(jax.grad(partial(loss, constrain=decoder.identity)))(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, want)

    text = split.lower(params, batch["tokens"]).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    assert bodies
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"%?([\w.-]+)", computation)
        if name and name[1] in bodies:
            assert not re.search(r"\b(all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", computation)


def test_every_block_of_queries_is_dealt_to_some_part():
    assert spread.parts_of(decoder.identity) == 1
    assert not spread.fits(LENGTH, 1) and not spread.fits(LENGTH, 16) and not spread.fits(1000, 4)
