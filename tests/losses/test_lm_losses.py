"""Language-model losses against their formulas; what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import bits_per_byte, cross_entropy, next_token_nll, seq_logprob, z_loss


def problem():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 3, 8)).astype(np.float32)
    unembed = (rng.normal(size=(19, 8)) / np.sqrt(8)).astype(np.float32)
    return hidden, unembed, rng.integers(0, 19, size=(2, 3))


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_cross_entropy_is_its_formula(z_weight, soft_cap):
    hidden, unembed, targets = problem()
    bias = np.linspace(-1, 1, 19).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, True]])
    z = hidden.astype(np.float64) @ unembed.T.astype(np.float64) + bias
    z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
    lse = np.log(np.exp(z).sum(-1))
    want = lse - np.take_along_axis(z, targets[..., None], -1)[..., 0] + z_weight * lse**2
    got = cross_entropy(hidden, unembed, targets, mask=mask, bias=bias, soft_cap=soft_cap, z_weight=z_weight)
    np.testing.assert_allclose(got, np.where(mask, want, 0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_cross_entropy_gradients(z_weight):
    hidden, unembed, targets = problem()

    def plain(hidden, unembed):
        z = hidden @ unembed.T
        nll = -jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)
        return nll.sum() + z_weight * jnp.square(jax.nn.logsumexp(z, axis=-1)).sum()

    want = jax.grad(plain, (0, 1))(hidden, unembed)
    got = jax.grad(lambda h, u: cross_entropy(h, u, targets, z_weight=z_weight).sum(), (0, 1))(hidden, unembed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), got, want)


def test_nll_of_a_masked_token_has_no_minus_sign():
    nll = next_token_nll(jnp.array([0.0, -1.5]))
    assert nll.tolist() == [0.0, 1.5] and not np.signbit(nll).any()


def test_z_loss_pulls_the_normaliser_to_zero():
    lse = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(z_loss(lse), 1e-4 * np.array([4.0, 0.0, 9.0]), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: z_loss(x, weight=0.5).sum())(lse), lse)


def test_seq_logprob_ignores_what_the_mask_drops():
    logprob = jnp.array([[-1.0, jnp.nan, -3.0], [jnp.nan, jnp.nan, jnp.nan]])
    mask = jnp.array([[True, False, True], [False, False, False]])
    assert seq_logprob(logprob, mask).tolist() == [-4.0, 0.0]
    assert seq_logprob(jnp.array([[-1.0, -2.0]])).tolist() == [-3.0]
    np.testing.assert_array_equal(jax.grad(lambda x: seq_logprob(x, mask).sum())(logprob), mask)


def test_a_uniform_model_of_bytes_needs_eight_bits_per_byte():
    nll = cross_entropy(jnp.ones((5, 4)), jnp.zeros((256, 4)), jnp.arange(5))
    np.testing.assert_allclose(bits_per_byte(nll.sum(), jnp.array(5)), 8.0, rtol=1e-6)


def test_the_import_loads_a_handful_of_modules_beyond_jax():
    code = "import jax, sys; before = set(sys.modules); import jaxlm.losses; print(*sorted(set(sys.modules) - before))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    allowed = {"jaxlm", "jaxtyping", "wadler_lindig", "numpy"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in done.stdout.split()} <= allowed
