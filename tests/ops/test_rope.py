"""Rotary embedding against formulas written a second time, one scalar at a time, and its defining properties."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import rope

BASE = [1e4 ** (-2 * i / 16) for i in range(8)]


def test_inverse_frequencies():
    np.testing.assert_allclose(rope.inverse_frequencies(16, 1e4), BASE, rtol=1e-14)


def test_linear_scaling_interpolates_positions():
    np.testing.assert_allclose(rope.linear_scaling(np.array(BASE), 4.0), [f / 4 for f in BASE], rtol=1e-14)


def llama3(frequency, factor, low, high, length):
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("length", [64, 512, 8192])
def test_llama3_scaling(length):
    want = [llama3(f, 8.0, 1.0, 4.0, length) for f in BASE]
    got = rope.llama3_scaling(
        np.array(BASE), factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=length
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert got[0] == BASE[0] and math.isclose(got[-1], BASE[-1] / 8)


def yarn(index, dim, theta, factor, fast, slow, length):
    low = math.floor(dim * math.log(length / (fast * 2 * math.pi)) / (2 * math.log(theta)))
    high = math.ceil(dim * math.log(length / (slow * 2 * math.pi)) / (2 * math.log(theta)))
    low, high = max(low, 0), min(high, dim - 1)
    extrapolated = theta ** (-2 * index / dim)
    if index <= low:
        return extrapolated
    if index >= high:
        return extrapolated / factor
    share = (index - low) / (high - low)
    return extrapolated / factor * share + extrapolated * (1 - share)


@pytest.mark.parametrize("theta, length", [(1e4, 4096), (1e6, 32768)])
def test_yarn_scaling(theta, length):
    want = [yarn(i, 64, theta, 4.0, 32.0, 1.0, length) for i in range(32)]
    base = rope.inverse_frequencies(64, theta)
    got = rope.yarn_scaling(base, theta=theta, factor=4.0, beta_fast=32.0, beta_slow=1.0, original_length=length)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert got[0] == base[0] and math.isclose(got[-1], base[-1] / 4)
    assert rope.yarn_attention_factor(4.0) == pytest.approx(1.1386294361)
    assert rope.yarn_attention_factor(1.0) == 1.0


def test_longrope_attention_factor():
    # Phi-3-mini-128k: sqrt(1 + ln(32) / ln(4096)) = sqrt(1 + 5/12).
    assert rope.longrope_attention_factor(131072, 4096) == pytest.approx(math.sqrt(17 / 12), rel=1e-12)
    assert rope.longrope_attention_factor(4096, 4096) == 1.0


def test_rotation_turns_pairs_of_the_two_halves_as_complex_numbers():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 8, 9, 100, 3]])
    frequencies = rope.inverse_frequencies(8, 100.0)
    got = np.asarray(rope.rotate(x, *rope.rotation(positions, frequencies)))
    angle = np.asarray(positions)[:, :, None, None] * frequencies
    turned = (np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])) * np.exp(1j * angle)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-6)


def test_partial_rotation_leaves_the_rest_of_the_head_alone():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    cos_sin = rope.rotation(jnp.arange(4)[None], rope.inverse_frequencies(4, 100.0))
    got = rope.rotate(x, *cos_sin)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_allclose(got[..., :4], rope.rotate(x[..., :4], *cos_sin), atol=0)


def test_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    frequencies = rope.inverse_frequencies(8, 100.0)

    def turn(x, at):
        return rope.rotate(x, *rope.rotation(jnp.array([[at]]), frequencies))

    def score(at_q, at_k):
        return float(jnp.sum(turn(q, at_q) * turn(k, at_k)))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=2e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rotation_is_float32_inside_and_keeps_the_dtype_outside():
    cos_sin = rope.rotation(jnp.array([[1001]]), np.array([1.0]))
    x = jnp.array([1.0, 0.0], jnp.bfloat16).reshape(1, 1, 1, 2)
    got = rope.rotate(x, *cos_sin)
    assert got.dtype == jnp.bfloat16
    want = np.array([math.cos(1001), math.sin(1001)])
    np.testing.assert_allclose(np.asarray(got, np.float32).ravel(), want, rtol=2**-8)
