"""Attention against a float64 loop over rows, heads and queries, and its degenerate rows."""

import logging

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from jaxlm.ops import attention as dispatch
from jaxlm.ops.attention import attention

B, T, N, K, H = 2, 6, 4, 2, 8
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [2 * jax.random.normal(k, (B, T, n, H)) for k, n in zip(keys, (N, K, K))]


def loops(q, k, v, positions, segments, *, window, soft_cap, scale):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = [
            s
            for s in range(T)
            if positions[b, s] <= positions[b, t]
            and (window is None or positions[b, t] - positions[b, s] < window)
            and (segments is None or segments[b, s] == segments[b, t] != 0)
        ]
        if not seen:
            continue
        logits = np.array([q[b, t, n] @ k[b, s, n // (N // K)] * scale for s in seen])
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ v[b, seen, n // (N // K)] / weights.sum()
    return out


def attend(qkv, segments, positions=POSITIONS, *, scale=0.3, **options):
    return attention(
        *qkv, q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments, scale=scale,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 2, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_loops(qkv, segments, window, soft_cap):
    got = attend(qkv, segments, window=window, soft_cap=soft_cap)
    segments = None if segments is None else np.asarray(segments)
    want = loops(*qkv, np.asarray(POSITIONS), segments, window=window, soft_cap=soft_cap, scale=0.3)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_grouped_heads_equal_repeated_ones(qkv):
    q, k, v = qkv
    repeated = [q, jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2)]
    np.testing.assert_allclose(attend(qkv, SEGMENTS), attend(repeated, SEGMENTS), atol=1e-6)


def test_a_query_without_keys_gives_zero_and_finite_gradients(qkv):
    out, pull = jax.vjp(lambda *qkv: attend(qkv, SEGMENTS), *qkv)
    assert np.all(np.asarray(out[1]) == 0) and np.all(np.asarray(out[0, 5]) == 0)
    for gradient in pull(jnp.ones_like(out)):
        assert np.all(np.isfinite(gradient)) and np.all(np.asarray(gradient[1]) == 0)


def test_gradients_match_finite_differences(qkv):
    jax.test_util.check_grads(lambda *qkv: attend(qkv, SEGMENTS, soft_cap=3.0, window=2), qkv, 1, ["rev"], eps=1e-2)


def test_huge_logits_stay_exact(qkv):
    q, k, v = qkv
    one_hot = attend([1e4 * q, 1e4 * k, v], None, scale=1.0)
    logits = np.einsum("tnh,snh->nts", np.asarray(q[1]), np.repeat(np.asarray(k[1]), N // K, 1))
    top = np.where(np.tri(T, dtype=bool), logits, -np.inf).argmax(-1)
    want = np.stack([np.asarray(v[1])[top[n], n // (N // K)] for n in range(N)], axis=1)
    np.testing.assert_allclose(one_hot[1], want, atol=1e-6)


def test_bfloat16_inputs_have_float32_softmax(qkv):
    low = [a.astype(jnp.bfloat16) for a in qkv]
    got = attend(low, SEGMENTS)
    assert got.dtype == jnp.bfloat16
    want = attend([a.astype(jnp.float32) for a in low], SEGMENTS)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=2**-6)


def test_unknown_names_and_heads_that_do_not_divide_are_errors(qkv):
    with pytest.raises(ValueError, match="unknown attention implementation 'fast'"):
        attend(qkv, None, implementation="fast")
    q, k, v = qkv
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attend([q[:, :, :3], k, v], None)


def test_the_choice_is_logged_once(qkv, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, "jaxlm.ops.attention"):
        attend(qkv, None)
        attend(qkv, None)
    assert [r.getMessage() for r in caplog.records] == ["attention: reference"]
