"""The summed loss whose gradient is made in the forward pass: the numbers of the oracle, and what it holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.token_stats import one_pass, one_pass_nll, token_stats
from jaxlm.ops.token_stats.contract import OUTPUTS

N, D, V = 37, 8, 21


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (N, D), dtype)
    unembed = jax.random.normal(keys[1], (V, D), jnp.promote_types(dtype, jnp.float32))
    bias = jax.random.normal(keys[2], (V,), unembed.dtype)
    return hidden, unembed, bias, jax.random.randint(keys[3], (N,), 0, V), jnp.arange(N) % 4 != 0


def by_the_oracle(hidden, unembed, bias, targets, mask, *, z_weight=0.0, soft_cap=None):
    options = dict(mask=mask, bias=bias, soft_cap=soft_cap, outputs=("logprob", "entropy", "logsumexp"))
    stats = token_stats(hidden, unembed, targets, implementation="dense", **options)
    return jnp.sum(-stats.logprob + z_weight * stats.logsumexp**2), stats


def in_one_pass(hidden, unembed, bias, targets, mask, **options):
    outputs = ("logprob", "entropy", "logsumexp")
    return one_pass_nll(hidden, unembed, targets, mask=mask, bias=bias, outputs=outputs, **options)


@pytest.mark.parametrize(
    "tile, block", [(1, V), (5 * V, 8), (1 << 23, 7), (1 << 23, 20)],
    ids=["a token, one block", "few tokens, a ragged block", "all tokens, three blocks", "all tokens, a block of one"],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"z_weight": 0.1}, {"soft_cap": 2.0, "z_weight": 0.1}], ids=str)
def test_value_statistics_and_gradients_are_the_oracles(monkeypatch, tile, block, options):
    monkeypatch.setattr(one_pass, "num_tiles", lambda n, v: -(-n // max(tile // v, 1)))
    monkeypatch.setitem(one_pass.MOST_BLOCK, "cpu", block)
    with jax.enable_x64(True):
        arrays = problem(jnp.float64)
        got, want = (
            jax.jit(jax.value_and_grad(lambda *a, f=f: f(*a, **options), (0, 1, 2), has_aux=True))(*arrays)
            for f in (in_one_pass, by_the_oracle)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


def test_not_differentiated_it_gives_the_same_numbers():
    arrays = problem()
    value, stats = in_one_pass(*arrays, z_weight=0.1)
    want, want_stats = by_the_oracle(*arrays, z_weight=0.1)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, want_stats)


def test_every_statistic_comes_out_of_blocks_as_from_the_whole(monkeypatch):
    hidden, unembed, bias, targets, mask = problem()

    def every(h):
        total, stats = one_pass_nll(h, unembed, targets, mask=mask, bias=bias, temperature=0.7, outputs=OUTPUTS)
        return total, stats

    monkeypatch.setitem(one_pass.MOST_BLOCK, "cpu", 8)
    (_, got), _ = jax.value_and_grad(every, has_aux=True)(hidden)
    options = dict(mask=mask, bias=bias, temperature=0.7, outputs=OUTPUTS)
    want = token_stats(hidden, unembed, targets, implementation="dense", **options)
    assert None not in got
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_what_was_not_asked_for_is_none():
    hidden, unembed, _, targets, _ = problem()
    total, stats = one_pass_nll(hidden, unembed, targets, outputs=("entropy",), z_weight=0.5)
    assert stats.logprob is None and stats.logsumexp is None and stats.entropy.shape == (N,)
    assert float(total) == pytest.approx(float(by_the_oracle(hidden, unembed, None, targets, None, z_weight=0.5)[0]))


def test_a_factor_on_the_loss_is_one_on_its_gradient():
    hidden, unembed, bias, targets, mask = problem()
    one, two = (
        jax.grad(lambda h, u, c=c: c * one_pass_nll(h, u, targets, mask=mask, bias=bias)[0], (0, 1))(hidden, unembed)
        for c in (1.0, -2.0)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-2 * a, b, rtol=1e-6), one, two)


def test_statistics_carry_no_gradient():
    hidden, unembed, _, targets, _ = problem()
    grad = jax.grad(lambda h: one_pass_nll(h, unembed, targets)[1].entropy.sum())(hidden)
    assert not np.any(np.asarray(grad))


def test_nothing_under_the_mask_reaches_value_or_gradient():
    hidden, unembed, bias, targets, mask = problem()
    poisoned = jnp.where(mask[:, None], hidden, jnp.nan)
    wild = jnp.where(mask, targets, -7)

    def run(h, t):
        return jax.value_and_grad(lambda h, u: one_pass_nll(h, u, t, mask=mask, bias=bias)[0], (0, 1))(h, unembed)

    jax.tree.map(np.testing.assert_array_equal, run(poisoned, wild), run(hidden, targets))
    nothing, grads = jax.value_and_grad(lambda h: one_pass_nll(h, unembed, targets, mask=jnp.zeros_like(mask))[0])(
        hidden
    )
    assert float(nothing) == 0 and not np.any(np.asarray(grads))


def test_a_target_outside_the_vocabulary_is_an_infinite_loss():
    hidden, unembed, _, targets, _ = problem()
    assert float(one_pass_nll(hidden, unembed, targets.at[3].set(V))[0]) == np.inf


def test_bfloat16_hidden_states_keep_a_float32_gradient_of_unembed():
    hidden, unembed, bias, targets, mask = problem(jnp.bfloat16)
    got, want = (
        jax.grad(lambda h, u, f=f: f(h, u, bias, targets, mask)[0], (0, 1))(hidden, unembed)
        for f in (in_one_pass, by_the_oracle)
    )
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    for a, b in zip(got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b)


def test_the_logits_are_never_held_at_once():
    tokens, width, vocab = 4096, 64, 32_768
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((tokens, width), "float32"), ((vocab, width), "float32"))]
    targets = jax.ShapeDtypeStruct((tokens,), "int32")
    gradient = jax.jit(jax.grad(lambda h, u, t: one_pass_nll(h, u, t)[0], (0, 1))).lower(*shapes, targets).compile()
    held = gradient.memory_analysis().temp_size_in_bytes
    assert held < 0.4 * tokens * vocab * 4
    assert f"f32[{tokens},{vocab}]" not in gradient.as_text()


def test_a_large_vocabulary_costs_no_second_gradient_of_unembed():
    tokens, width, vocab = 128, 64, 131_072
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((tokens, width), "float32"), ((vocab, width), "float32"))]
    targets = jax.ShapeDtypeStruct((tokens,), "int32")
    gradient = jax.jit(jax.grad(lambda h, u, t: one_pass_nll(h, u, t)[0], (0, 1))).lower(*shapes, targets).compile()
    logits = 4 * tokens * vocab
    assert gradient.memory_analysis().temp_size_in_bytes < logits + 4 * vocab * width / 4
