"""Values of token_stats against numpy float64, in every implementation."""

from __future__ import annotations

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import token_stats as token_stats_eager
from jaxlm.ops.token_stats import token_stats_from_logits
from jaxlm.ops.token_stats.dispatch import _announced
from jaxlm.ops.token_stats.tiled import default_block, tiled

ALL = ("logprob", "entropy", "logsumexp")
token_stats = jax.jit(token_stats_eager, static_argnames=("soft_cap", "outputs", "implementation"))
XLA = ("dense", "tiled")
implementations = pytest.mark.parametrize("implementation", XLA)


def problem(n, d, v, *, seed=0, dtype=np.float32):
    """Hidden states and an unembedding whose logits have unit variance: a wrong tail of the vocabulary then shows."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, d)).astype(dtype)
    unembed = (rng.normal(size=(v, d)) / np.sqrt(d)).astype(np.float32)
    return hidden, unembed, rng.integers(0, v, size=n)


def oracle(hidden, unembed, targets, *, bias=0.0, temperature=1.0, soft_cap=None):
    """(logprob, entropy, logsumexp) in numpy float64."""
    z = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T + np.asarray(bias, np.float64)
    z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
    return oracle_from_logits(z / temperature, targets)


def oracle_from_logits(z, targets):
    below = z - z.max(-1, keepdims=True)
    log_total = np.log(np.exp(below).sum(-1, keepdims=True))
    log_p = below - log_total
    entropy = -(np.exp(log_p) * np.where(np.isneginf(log_p), 0, log_p)).sum(-1)
    logprob = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    return logprob, entropy, (z.max(-1, keepdims=True) + log_total)[..., 0]


def assert_stats(stats, expected, *, atol):
    for name, got, want in zip(ALL, stats, expected):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol, err_msg=name)


def small_blocks(hidden, unembed, targets, *, block, outputs=ALL, bias=None):
    arrays = jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(targets)
    run = partial(tiled, bias=bias, temperature=None, soft_cap=None, outputs=outputs, block=block)
    return jax.jit(run)(*arrays)


@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 32, 33, 63, 64, 65, 97])
def test_a_ragged_vocabulary_counts_every_entry_once(vocab):
    hidden, unembed, targets = problem(5, 16, vocab)
    targets[0], targets[1] = 0, vocab - 1
    assert_stats(small_blocks(hidden, unembed, targets, block=32), oracle(hidden, unembed, targets), atol=2e-6)


@implementations
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("vocab", [3, 511, 512, 513])
def test_values(implementation, tokens, vocab):
    hidden, unembed, targets = problem(tokens, 24, vocab)
    stats = token_stats(hidden, unembed, targets, outputs=ALL, implementation=implementation)
    assert_stats(stats, oracle(hidden, unembed, targets), atol=3e-6)


@implementations
@pytest.mark.parametrize("temperature", [1e-2, 0.7, 100.0])
@pytest.mark.parametrize("soft_cap", [None, 0.5, 30.0])
def test_bias_soft_cap_then_temperature(implementation, temperature, soft_cap):
    hidden, unembed, targets = problem(6, 16, 45)
    bias = np.random.default_rng(1).normal(size=45).astype(np.float32)
    options = {"bias": bias, "temperature": temperature, "soft_cap": soft_cap}
    stats = token_stats(hidden, unembed, targets, outputs=ALL, implementation=implementation, **options)
    assert_stats(stats, oracle(hidden, unembed, targets, **options), atol=1e-6 * max(3, 5 / temperature))


@implementations
def test_leading_shape_and_dtype(implementation):
    hidden, unembed, targets = problem(6, 8, 11)
    flat = token_stats(hidden, unembed, targets, outputs=ALL, implementation=implementation)
    shaped = token_stats(
        hidden.reshape(2, 3, 8), unembed, targets.reshape(2, 3), outputs=ALL, implementation=implementation
    )
    single = token_stats(hidden[0], unembed, targets[0], outputs=ALL, implementation=implementation)
    for one, some, all_ in zip(*map(jax.tree.leaves, (single, shaped, flat))):
        assert some.shape == (2, 3) and one.shape == () and some.dtype == jnp.float32
        np.testing.assert_array_equal(some.reshape(-1), all_)
        np.testing.assert_allclose(one, all_[0], rtol=1e-6)


@implementations
def test_only_what_is_asked_for(implementation):
    hidden, unembed, targets = problem(3, 8, 11)
    full = token_stats(hidden, unembed, targets, outputs=ALL, implementation=implementation)
    for name in ALL:
        stats = token_stats(hidden, unembed, targets, outputs=(name,), implementation=implementation)
        assert [field for field in ALL if getattr(stats, field) is not None] == [name]
        np.testing.assert_array_equal(getattr(stats, name), getattr(full, name))


@implementations
@pytest.mark.parametrize("offset", [1e3, -1e4, 1e4])
def test_a_common_offset_of_the_logits_costs_no_digits(implementation, offset):
    hidden, unembed, targets = problem(8, 16, 700)
    bias = np.full(700, offset, np.float32)
    stats = token_stats(hidden, unembed, targets, bias=bias, implementation=implementation)
    # float32 holds z + 1e4 to 5e-4; the oracle gets the same rounded logits, so that only our own error is left.
    z = np.asarray(jnp.asarray(hidden) @ jnp.asarray(unembed).T + bias)
    logprob, entropy, _ = oracle_from_logits(z.astype(np.float64), targets)
    rounding = 2 * np.spacing(np.float32(abs(offset)))  # of z itself: the two products may round differently
    np.testing.assert_allclose(stats.logprob, logprob, rtol=0, atol=rounding)
    np.testing.assert_allclose(stats.entropy, entropy, rtol=0, atol=rounding / 4)


@implementations
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_signs_are_exact(implementation, scale):
    hidden, unembed, _ = problem(64, 16, 1031, seed=3)
    targets = (scale * hidden @ unembed.T).argmax(1)
    bias = np.linspace(-1, 1, 1031, dtype=np.float32) * scale
    for options in ({}, {"bias": bias, "temperature": 0.3}, {"soft_cap": 20.0, "temperature": 0.3}):
        stats = token_stats(scale * hidden, unembed, targets, outputs=ALL, implementation=implementation, **options)
        assert bool((stats.logprob <= 0).all()) and bool((stats.entropy >= 0).all())
        assert bool((stats.entropy <= np.log(1031) + 1e-5).all()) and bool(jnp.isfinite(stats.logsumexp).all())


@implementations
def test_equal_logits_have_the_entropy_of_the_uniform_distribution(implementation):
    stats = token_stats(jnp.ones((2, 4)), jnp.zeros((1000, 4)), jnp.array([0, 999]), implementation=implementation)
    np.testing.assert_allclose(stats.entropy, np.log(1000), rtol=5e-7)
    np.testing.assert_allclose(stats.logprob, -np.log(1000), rtol=5e-7)


@implementations
def test_probabilities_sum_to_one(implementation):
    hidden, unembed, _ = problem(3, 8, 67)
    every = np.broadcast_to(np.arange(67), (3, 67))
    rows = np.broadcast_to(hidden[:, None], (3, 67, 8))
    stats = token_stats(rows, unembed, every, outputs=ALL, implementation=implementation)
    np.testing.assert_allclose(np.exp(stats.logprob).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(-(np.exp(stats.logprob) * stats.logprob).sum(1), stats.entropy[:, 0], rtol=1e-6)


@implementations
def test_minus_infinity_in_the_bias_forbids_an_entry(implementation):
    hidden, unembed, _ = problem(4, 8, 40)
    targets, bias = np.array([10, 25, 39, 12]), np.zeros(40, np.float32)
    bias[:10] = -np.inf
    stats = token_stats(hidden, unembed, targets, bias=bias, outputs=ALL, implementation=implementation)
    assert_stats(stats, oracle(hidden, unembed[10:], targets - 10), atol=2e-6)
    forbidden = token_stats(hidden, unembed, np.zeros(4, int), bias=bias, implementation=implementation)
    assert bool(jnp.isneginf(forbidden.logprob).all())


def test_whole_blocks_may_be_forbidden():
    hidden, unembed, targets = problem(4, 8, 40)
    targets = 20 + targets // 2
    bias = jnp.where(jnp.arange(40) < 20, -jnp.inf, 0.0)
    stats = small_blocks(hidden, unembed, targets, block=8, bias=bias)
    assert_stats(stats, oracle(hidden, unembed[20:], targets - 20), atol=2e-6)


@implementations
def test_a_masked_position_is_exactly_zero_whatever_stands_there(implementation):
    hidden, unembed, targets = problem(6, 8, 21)
    mask = np.array([True, False, True, False, False, True])
    clean = token_stats(hidden[mask], unembed, targets[mask], outputs=ALL, implementation=implementation)
    hidden[1], hidden[3], hidden[4] = np.nan, np.inf, -np.inf
    targets[1], targets[3] = -100, 10**6
    stats = token_stats(hidden, unembed, targets, mask=mask, outputs=ALL, implementation=implementation)
    for got, want in zip(jax.tree.leaves(stats), jax.tree.leaves(clean)):
        np.testing.assert_array_equal(got[~mask], 0)
        np.testing.assert_allclose(got[mask], want, rtol=1e-6, atol=1e-7)


@implementations
def test_all_masked(implementation):
    hidden, unembed, targets = problem(3, 8, 21)
    stats = token_stats(
        hidden * np.nan, unembed, targets, mask=np.zeros(3, bool), outputs=ALL, implementation=implementation
    )
    assert [x.tolist() for x in jax.tree.leaves(stats)] == [[0.0] * 3] * 3


@implementations
def test_an_unmasked_nan_is_not_hidden(implementation):
    hidden, unembed, targets = problem(3, 8, 21)
    hidden[1, 0] = np.nan
    stats = token_stats(hidden, unembed, targets, outputs=ALL, implementation=implementation)
    for x in jax.tree.leaves(stats):
        assert np.isnan(x).tolist() == [False, True, False]


@implementations
def test_a_target_outside_the_vocabulary_is_impossible(implementation):
    hidden, unembed, _ = problem(4, 8, 21)
    targets = jnp.array([-1, 21, 0, -100])
    stats = token_stats(hidden, unembed, targets, implementation=implementation)
    assert jnp.isneginf(stats.logprob).tolist() == [True, True, False, True]
    assert bool(jnp.isfinite(stats.entropy).all())


@implementations
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_bfloat16_is_as_exact_as_its_operands(implementation, scale):
    hidden, unembed, targets = problem(32, 64, 1500)
    hidden = jnp.asarray(scale * hidden, jnp.bfloat16)
    rounded = jnp.asarray(unembed).astype(jnp.bfloat16)
    expected = oracle(hidden.astype(jnp.float32), rounded.astype(jnp.float32), targets)
    largest = float(np.abs(expected[2]).max())
    for table in (unembed, rounded):  # a float32 table is rounded block by block
        stats = token_stats(hidden, table, targets, outputs=ALL, implementation=implementation)
        assert_stats(stats, expected, atol=2e-7 * max(10, largest))
        assert stats.logprob.dtype == jnp.float32


@implementations
def test_float64_operands_are_kept(implementation):
    with jax.enable_x64(True):
        hidden, unembed, targets = problem(7, 16, 601)
        options = {"bias": np.linspace(0, 1, 601), "temperature": 0.7, "soft_cap": 2.0}
        stats = token_stats(
            hidden.astype(np.float64), unembed.astype(np.float64), targets, outputs=ALL,
            implementation=implementation, **options,
        )  # fmt: skip
        expected = oracle(hidden, unembed, targets, **options)
        assert_stats(stats, expected, atol=1e-13)


def test_from_logits_is_the_same():
    hidden, unembed, targets = problem(6, 16, 45)
    mask, logits = np.arange(6) % 2 == 0, hidden @ unembed.T
    logits[1] = np.nan
    got = token_stats_from_logits(jnp.asarray(logits), targets, mask=mask, temperature=0.7, outputs=ALL)
    want = token_stats(hidden, unembed, targets, mask=mask, temperature=0.7, outputs=ALL)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_from_bfloat16_logits_is_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 33)), jnp.bfloat16)
    stats = token_stats_from_logits(logits, jnp.arange(4), outputs=ALL)
    expected = oracle_from_logits(np.asarray(logits, np.float64), np.arange(4))
    assert_stats(stats, expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"implementation": "cuda"}, "expected one of dense, tiled.*'cuda'"),
        ({"outputs": ("nll",)}, "expected a non-empty tuple drawn from .*nll"),
        ({"outputs": "logprob"}, "expected a non-empty tuple"),
        ({"outputs": ()}, "expected a non-empty tuple"),
        ({"temperature": 0.0}, "expected a number above 0, found 0.0"),
        ({"temperature": np.ones(3)}, r"expected a scalar, found shape \(3,\)"),
        ({"soft_cap": 0.0}, "soft_cap: expected a number above 0"),
        ({"unembed": np.zeros((8, 21), np.float32)}, "must be transposed"),
        ({"targets": np.zeros(3, np.float32)}, "expected integer targets"),
        ({"targets": np.zeros((3, 0), int)}, r"of shape \(3,\)"),
        ({"mask": np.ones(3, np.float32)}, "expected a boolean mask"),
        ({"bias": np.zeros(20, np.float32)}, r"expected bias of shape \(21,\)"),
    ],
)
def test_errors_say_what_to_change(change, message):
    hidden, unembed, targets = problem(3, 8, 21)
    arguments = {"hidden": hidden, "unembed": unembed, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        token_stats_eager(**arguments)


def test_the_choice_is_logged_once(caplog):
    _announced.cache_clear()
    hidden, unembed, targets = problem(3, 8, 21)
    with caplog.at_level(logging.INFO, logger="jaxlm.ops.token_stats"):
        token_stats_eager(hidden, unembed, targets)
        token_stats_eager(hidden, unembed, targets)
    assert [record.getMessage() for record in caplog.records] == ["token_stats on cpu: implementation 'tiled'"]


@pytest.mark.parametrize("tokens, block", [(1, 2048), (256, 2048), (1024, 1024), (1000, 1024), (10**6, 512)])
def test_the_block_keeps_the_tile_of_logits_in_the_cache(tokens, block):
    assert default_block(tokens, 512) == block
