"""Blockwise attention against the reference: values and gradients under every mask, and the tiles that it skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import attention as dispatch
from jaxlm.ops.attention import attention, blockwise
from jaxlm.ops.platform import compiling_for

B, T, N, K, H = 2, 32, 4, 2, 8
BLOCK = 8
PACKED = jnp.array([[1] * 5 + [2] * 14 + [3] * 9 + [0] * 4, [0] * T])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", {"cpu": BLOCK})
    monkeypatch.setattr(blockwise, "LEAST", BLOCK)


def inputs(length=T, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (2 * jax.random.normal(key, (B, length, N, H), dtype) for key in keys[:2])
    k, v = (2 * jax.random.normal(key, (B, T, K, H), dtype) for key in keys[2:])
    return (q, k, v), dout


def value_and_gradients(implementation, qkv, dout, *, q_positions, k_positions=None, segments=None, **options):
    def call(*qkv):
        return attention(
            *qkv, q_positions=q_positions, k_positions=q_positions if k_positions is None else k_positions,
            q_segments=segments, k_segments=segments, implementation=implementation, **{"scale": 0.3, **options},
        )  # fmt: skip

    @jax.jit
    def both(qkv, dout):
        out, pull = jax.vjp(call, *qkv)
        return out, *pull(dout)

    return both(qkv, dout)


def assert_agree(qkv, dout, *, atol=2e-5, **where):
    got = value_and_gradients("blockwise", qkv, dout, **where)
    want = value_and_gradients("reference", qkv, dout, **where)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol, err_msg=name)


def positions(length=T):
    return jnp.broadcast_to(jnp.arange(length), (B, length))


@pytest.mark.parametrize(
    "options",
    [{}, {"segments": PACKED}, {"window": 9}, {"soft_cap": 1.5}, {"segments": PACKED, "window": 1, "soft_cap": 1.5}],
    ids=["causal", "packed", "window", "soft_cap", "all"],
)
def test_equals_the_reference(options):
    assert_agree(*inputs(), q_positions=positions(), **options)


def test_positions_may_come_in_any_order():
    shuffled = jax.random.permutation(jax.random.key(1), positions(), axis=1, independent=True)
    assert_agree(*inputs(), q_positions=shuffled)


def test_a_cache_longer_than_the_queries():
    assert_agree(*inputs(length=16), q_positions=positions(16) + 7, k_positions=positions())


def test_bfloat16_errs_by_a_few_roundings():
    qkv, dout = inputs(dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in qkv], dout.astype(jnp.float32)
    got = value_and_gradients("blockwise", qkv, dout, q_positions=positions())
    want = value_and_gradients("reference", *wide, q_positions=positions())
    for a, b in zip(got, want):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(a) - b) < 6e-3 * np.linalg.norm(b)


def test_rows_without_any_key_are_zero_with_zero_gradients():
    out, *gradients = value_and_gradients("blockwise", *inputs(), q_positions=positions(), segments=PACKED)
    assert np.all(np.asarray(out[1]) == 0) and np.all(np.asarray(out[0, -4:]) == 0)
    for gradient in gradients:
        assert np.all(np.asarray(gradient[1]) == 0) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    "segments, window, want",
    [(None, None, [(0, 1), (0, 2), (0, 3), (0, 4)]), (None, 9, [(0, 1), (0, 2), (1, 3), (2, 4)])],
    ids=["causal", "window"],
)
def test_only_tiles_with_something_to_see_are_visited(segments, window, want):
    where = blockwise._Where(blockwise._blocks(positions(), BLOCK), segments)
    start, stop = blockwise._bounds(blockwise._Plan(1.0, window, None, BLOCK), where, where)
    assert list(zip(start.tolist(), stop.tolist())) == want


def test_no_square_of_the_length_is_held():
    long = 64 * BLOCK
    qkv = [jax.ShapeDtypeStruct((1, long, 1, H), jnp.float32)] * 3
    where = jnp.arange(long)[None]

    def total(*qkv):
        return attention(*qkv, q_positions=where, k_positions=where, scale=1.0, implementation="blockwise").sum()

    memory = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*qkv).compile().memory_analysis()
    assert memory.temp_size_in_bytes < long * long


def test_dispatch_takes_it_for_whole_blocks_on_cpu():
    assert dispatch._best(T, 2 * T) == "blockwise"
    assert dispatch._best(1, T) == dispatch._best(T + 1, T + 1) == "reference"


def test_on_accelerators_it_is_taken_where_all_logits_would_be_too_many(monkeypatch):
    monkeypatch.setattr(dispatch, "LOGITS_AT_ONCE", T * T)
    for name in ("tpu", "gpu"):
        with compiling_for(name):
            assert dispatch._best(T, T) == "reference" and dispatch._best(2 * T, T) == "blockwise"
            assert dispatch._best(1, 8 * T * T) == "reference"


def test_the_block_is_the_platforms_as_far_as_it_divides_the_lengths(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", {"cpu": 128, "tpu": 512})
    assert blockwise.block_size(1024, 384) == 128
    with compiling_for("tpu"):
        assert blockwise.block_size(1024, 2048) == 512 and blockwise.block_size(1024, 384) == 128


def test_ragged_lengths_are_refused():
    qkv, _ = inputs(length=T - 1)
    with pytest.raises(ValueError, match="multiples of 8 queries and keys, found 31 and 32"):
        value_and_gradients("blockwise", qkv, None, q_positions=positions(T - 1), k_positions=positions())
