"""Splash attention, interpreted: the reference's values and gradients, on one device and a mesh; what goes to it."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.ops import attention as dispatch
from jaxlm.ops.attention import attention, splash
from jaxlm.ops.masks import segment_positions
from jaxlm.ops.platform import compiling_for
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import make_constrain
from jaxlm.sharding.topology import ENVIRONMENT

B, T, N, K, H = 2, 256, 4, 2, 64


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (B, T, heads, H), dtype) for key, heads in zip(keys, (N, K, K)))


def packed_segments():
    segments = np.repeat([[1, 2, 3, 3], [5, 5, 6, 0]], T // 4, axis=1).astype(np.int32)
    segments[0, 37:90] = 7  # a document that ends within a tile
    segments[0, 90:128] = 8
    segments[1, -20:] = 0
    return jnp.asarray(segments)


def outcome(name, operands, segments, constrain=None, **options):
    """The result and the gradients of a function of it that no symmetry makes simple."""
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if segments is None else segment_positions(segments)
    where = dict(q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments, scale=0.2)

    def loss(*operands):
        out = attention(*operands, **where, **options, in_order=True, constrain=constrain, implementation=name)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)) * jnp.cos(jnp.arange(T))[:, None, None]), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*operands)


OPTIONS = [{}, {"packed": True}, {"window": 70}, {"soft_cap": 1.5, "window": 130, "packed": True}]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as where a kernel need not be split


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_the_references(options):
    options = dict(options)
    segments = packed_segments() if options.pop("packed", False) else None
    found, want = (outcome(name, inputs(), segments, **options) for name in ("splash", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, want)
    if segments is not None:
        assert not np.any(found[0][1][segments == 0])
        assert not any(np.any(grad[segments == 0]) for grad in found[1])


def test_bfloat16_is_within_the_rounding_of_its_inputs():
    (_, found), grads = outcome("splash", inputs(jnp.bfloat16), packed_segments())
    (_, want), exact = outcome("reference", [x.astype(jnp.float32) for x in inputs(jnp.bfloat16)], packed_segments())
    assert found.dtype == grads[0].dtype == jnp.bfloat16
    for a, b in zip((found, *grads), (want, *exact)):
        assert np.abs(a.astype(jnp.float32) - b).max() < 2**-6 * np.abs(b).max()


@pytest.mark.parametrize("mesh", [dict(slice=2, fsdp=1, tensor=2), dict(data=1, fsdp=2)], ids=str)
def test_on_a_mesh_every_device_runs_its_rows_and_heads(mesh):
    mesh = make_mesh(MeshConfig(**mesh), devices=jax.devices()[: int(np.prod([*mesh.values()]))])
    operands, segments = inputs(), packed_segments()
    found = outcome("splash", operands, segments, make_constrain(mesh))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        found, outcome("reference", operands, segments),
    )  # fmt: skip


def test_what_it_cannot_do_is_told(monkeypatch):
    q, k, v = inputs()
    told = partial(splash.obstacle, in_order=True, constrain=None)
    assert told(q, k) is None
    assert "in order" in splash.obstacle(q, k, in_order=False, constrain=None)
    assert "in order" in told(q[:, :128], k)
    assert "not float16" in told(q.astype(jnp.float16), k)
    assert "multiple of 128" in told(q[:, :100], k[:, :100])
    assert "64 entries" in told(q[..., :40], k[..., :40])
    split = make_constrain(make_mesh(MeshConfig(sequence=4, data=2)))
    assert "whole on a device" in splash.obstacle(q, k, in_order=True, constrain=split)
    monkeypatch.undo()  # eight devices, and nothing says how the operands lie on them
    assert "whole on a device" in told(q, k)
    with pytest.raises(ValueError, match="'splash' takes rows in order"):
        attention(q, k, v, q_positions=jnp.zeros((B, T), int), k_positions=jnp.zeros((B, T), int), scale=1.0,
                  implementation="splash")  # fmt: skip


def test_it_is_taken_on_tpus_only():
    for platform, name in (("tpu", "splash"), ("cpu", "blockwise"), ("gpu", "reference")):
        with compiling_for(platform):
            assert dispatch._best(T, T, ["splash"]) == name


@pytest.mark.parametrize("given", ["nothing", "segments", "in order"])
def test_a_decoder_promises_it_for_packed_rows(given, monkeypatch):
    seen = []
    monkeypatch.setattr("jaxlm.models.block.attention", lambda q, k, v, **kw: (seen.append(kw["in_order"]), q)[1])
    cfg = DecoderConfig(
        vocab_size=64, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64, max_length=T,
    )  # fmt: skip
    params = specs.init(jax.random.key(0), decoder.spec(cfg))
    segments = packed_segments()
    packing = dict(positions=segment_positions(segments), segments=segments)
    options = {"nothing": {}, "segments": packing, "in order": packing | {"in_order": True}}[given]
    decoder.forward(params, jnp.zeros((B, T), int), cfg=cfg, **options)
    assert set(seen) == {given != "segments"}


AHEAD = """if True:
    import json, re, sys
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxlm.ops.attention import attention
    from jaxlm.ops.platform import compiling_for
    from jaxlm.sharding.mesh import MeshConfig, make_mesh
    from jaxlm.sharding.place import make_constrain
    from jaxlm.sharding.topology import devices_of

    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices_of(sys.argv[1]))
    at = lambda *shape, dtype=jnp.bfloat16, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    rows = P(("slice", "data", "fsdp"), None, "tensor", None)
    length, dim = 8192, int(sys.argv[2])
    args = [at(2, length, heads, dim, spec=rows) for heads in (8, 2, 2)]
    args.append(at(2, length, dtype=jnp.int32, spec=P(("slice", "data", "fsdp"))))

    def loss(q, k, v, segments):
        where = dict(q_positions=segments, k_positions=segments, q_segments=segments, k_segments=segments)
        out = attention(q, k, v, **where, scale=0.1, in_order=True, constrain=make_constrain(mesh))
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with compiling_for("tpu"):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()
    text = compiled.as_text()
    print(json.dumps({
        "kernels": len(re.findall(r"custom_call_target=.tpu_custom_call", text)),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "square": len(re.findall(rf"{length},{length}[\\],]", text)),
        "collectives": re.findall(r"(?:all-gather|all-reduce|all-to-all)\\(", text),
    }))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")
@pytest.mark.parametrize("topology, dim", [("v5e:2x2", 64), ("v5p:2x2x1", 128), ("v6e:2x2", 256)])
def test_it_compiles_for_real_chips_at_8k_without_a_square(topology, dim):
    # With the compiler's usual pains, unlike other tests: with the least, a sum stays that nobody reads.
    usual = {"JAX_OPTIMIZATION_LEVEL": "UNKNOWN", "JAX_MEMORY_FITTING_LEVEL": "O2"}
    env = os.environ | ENVIRONMENT | {"XLA_FLAGS": ""} | usual
    done = subprocess.run([sys.executable, "-c", AHEAD, topology, str(dim)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"] == 3 and not found["square"] and not found["collectives"]
    # A device has one row of four heads: its queries, outputs and their gradients, and a few statistics of each token.
    assert found["temporary"] < 12 * 8192 * 4 * max(dim, 128) * 4
