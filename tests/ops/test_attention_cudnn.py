"""cuDNN's attention: what goes to it, what is refused, and, where there is a GPU, the reference's values from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.ops import attention as dispatch
from jaxlm.ops.attention import attention, cudnn
from jaxlm.ops.platform import compiling_for

B, T, N, K, H = 2, 256, 8, 2, 64
ON_GPU = jax.default_backend() == "gpu"


def inputs(dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (B, T, N, H), dtype) for key in keys[:2])
    return (q, *(jax.random.normal(key, (B, T, K, H), dtype) for key in keys[2:])), dout


POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
WHERE = dict(q_positions=POSITIONS, k_positions=POSITIONS, scale=0.3)


def obstacle(**changes):
    given = dict(length=T, keys=T, heads=H, dtype=jnp.bfloat16, in_order=True, packed=False, soft_cap=None) | changes
    q = jax.ShapeDtypeStruct((B, given["length"], N, given["heads"]), given["dtype"])
    k = jax.ShapeDtypeStruct((B, given["keys"], K, given["heads"]), given["dtype"])
    return cudnn.obstacle(q, k, **{name: given[name] for name in ("in_order", "packed", "soft_cap")})


@pytest.mark.parametrize(
    "changes",
    [
        {"in_order": False}, {"packed": True}, {"keys": 2 * T}, {"dtype": jnp.float32}, {"heads": 256}, {"heads": 20},
        {"length": 100, "keys": 100}, {"soft_cap": 30.0},
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_told(changes):
    assert obstacle() is None
    assert obstacle(**changes)


def test_asked_for_by_name_it_refuses_with_the_reason():
    qkv, _ = inputs()
    with pytest.raises(ValueError, match="without positions, segments or a cache; use 'blockwise'"):
        attention(*qkv, **WHERE, implementation="cudnn")
    with pytest.raises(ValueError, match="not float32"):
        attention(*inputs(jnp.float32)[0], **WHERE, in_order=True, implementation="cudnn")


def test_it_is_taken_on_gpus_only():
    with compiling_for("gpu"):
        assert dispatch._best(T, T, ["cudnn"]) == "cudnn"
        assert dispatch._best(T, T, []) == "reference"
    with compiling_for("tpu"):
        assert dispatch._best(T, T, ["cudnn"]) == "reference"


@pytest.mark.parametrize(
    "positions, segments, want", [(None, None, True), (POSITIONS, None, False), (None, jnp.ones((B, T), int), False)]
)
def test_the_model_promises_order_only_where_it_derived_it(monkeypatch, positions, segments, want):
    cfg = DecoderConfig(
        vocab_size=16, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32, max_length=T
    )
    promised = []

    def spy(*args, **options):
        promised.append(options["in_order"])
        return attention(*args, **options)

    monkeypatch.setattr("jaxlm.models.block.attention", spy)
    params = specs.init(jax.random.key(0), decoder.spec(cfg))
    decoder.forward(params, jnp.zeros((B, T), int), cfg=cfg, positions=positions, segments=segments)
    assert set(promised) == {want}


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 64])
def test_equals_the_reference(window):
    qkv, dout = inputs()

    def both(implementation, qkv, dout):
        def call(*qkv):
            return attention(*qkv, **WHERE, window=window, in_order=True, implementation=implementation)

        out, pull = jax.vjp(call, *qkv)
        return out, *pull(dout)

    got = jax.jit(both, static_argnums=0)("cudnn", qkv, dout)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(both, static_argnums=0)("reference", *jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, dout)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(a) - b) < 6e-3 * np.linalg.norm(b), name


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_no_square_of_the_length_is_held():
    long = 8192
    qkv = [jax.ShapeDtypeStruct((1, long, n, H), jnp.bfloat16) for n in (N, K, K)]
    where = jnp.arange(long)[None]

    def total(*qkv):
        out = attention(*qkv, q_positions=where, k_positions=where, scale=1.0, in_order=True, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    memory = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*qkv).compile().memory_analysis()
    assert memory.temp_size_in_bytes < long * long
