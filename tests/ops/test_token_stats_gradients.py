"""Derivatives of token_stats: against the float64 oracle, through every output, under every transform."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

from jaxlm.ops.token_stats import token_stats
from jaxlm.ops.token_stats.tiled import tiled

ALL = ("logprob", "entropy", "logsumexp")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(ALL, n)]
XLA = ("dense", "tiled")
implementations = pytest.mark.parametrize("implementation", XLA)


def problem(n=6, d=8, v=37, *, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (n, d), dtype)
    unembed = jax.random.normal(keys[1], (v, d), dtype) * d**-0.5
    return hidden, unembed, jax.random.normal(keys[2], (v,), dtype), jax.random.randint(keys[3], (n,), 0, v)


def weighted(stats, *, seed=5):
    """A scalar that every output of every token enters with a weight of its own."""
    weights = np.random.default_rng(seed).normal(size=(len(ALL), *jax.tree.leaves(stats)[0].shape))
    return sum((w * x).sum() for w, x in zip(weights, stats) if x is not None)


def blocks_of(block, hidden, unembed, bias, targets, outputs=ALL, soft_cap=None):
    """`tiled` with blocks small enough for several, and a ragged one, in a small vocabulary."""
    options = {"temperature": None, "soft_cap": soft_cap, "outputs": outputs}
    return tiled(hidden, unembed, targets, bias=bias, block=block, **options)


def everything(implementation, hidden, unembed, bias, targets, **options):
    options = {"outputs": ALL, "implementation": implementation} | options
    return token_stats(hidden, unembed, targets, bias=bias, **options)


def gradients(stats, *arrays, factor=1.0):
    """Gradients with respect to (hidden, unembed, bias) of a weighted sum of all outputs."""
    return jax.jit(jax.grad(lambda *a: factor * weighted(stats(*a)), tuple(range(len(arrays)))))(*arrays)


def assert_trees_close(got, want, *, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("outputs", SUBSETS, ids="+".join)
def test_gradients_through_every_combination_of_outputs(outputs):
    hidden, unembed, bias, targets = problem(v=45)
    mask = jnp.array([True, False, True, True, True, False])

    options = {"temperature": 0.7, "soft_cap": 3.0, "outputs": outputs, "mask": mask, "targets": targets}
    grads = {i: gradients(partial(everything, i, **options), hidden, unembed, bias) for i in XLA}
    assert_trees_close(grads["tiled"], grads["dense"], rtol=2e-6)
    assert not np.asarray(grads["tiled"][0])[~mask].any()


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 31, 32, 33, 37])
def test_gradients_of_a_ragged_vocabulary(vocab):
    with jax.enable_x64(True):
        hidden, unembed, bias, targets = problem(v=vocab, dtype=jnp.float64)
        want = gradients(partial(everything, "dense", targets=targets), hidden, unembed, bias)
        got = gradients(partial(blocks_of, 16, targets=targets), hidden, unembed, bias)
        assert_trees_close(got, want, rtol=1e-13)


def test_numerical_derivatives_to_second_order():
    with jax.enable_x64(True):
        hidden, unembed, bias, targets = problem(n=3, d=4, v=9, dtype=jnp.float64)
        f = jax.jit(partial(blocks_of, 4, targets=targets, soft_cap=2.0))
        check_grads(f, (hidden, unembed, bias), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_numerical_derivatives_of_the_oracle_in_both_modes():
    with jax.enable_x64(True):
        hidden, unembed, bias, targets = problem(n=3, d=4, v=9, dtype=jnp.float64)
        f = jax.jit(partial(everything, "dense", targets=targets))
        check_grads(f, (hidden, unembed, bias), order=1, atol=1e-6, rtol=1e-6)


def test_second_derivatives_match_the_oracle():
    with jax.enable_x64(True):
        hidden, unembed, bias, targets = problem(dtype=jnp.float64)

        def hessian_product(stats):
            def total(*arrays):
                grads = jax.grad(lambda *a: weighted(stats(*a)), (0, 1, 2))(*arrays)
                return sum(jnp.sin(g).sum() for g in grads)

            return jax.jit(jax.grad(total, (0, 1, 2)))(hidden, unembed, bias)

        got = hessian_product(partial(blocks_of, 16, targets=targets))
        assert_trees_close(got, hessian_product(partial(everything, "dense", targets=targets)), rtol=1e-12)


def test_identities_of_the_logit_gradient():
    # The gradient of the bias, one token, is dz itself: sum dz = s, <dz, z - mean> = g (z_y - mean) - h Var(z).
    with jax.enable_x64(True):
        hidden, unembed, bias, targets = problem(n=1, dtype=jnp.float64)
        (g, h, s), z = (0.3, -1.7, 0.6), (hidden @ unembed.T + bias)[0]
        p = jax.nn.softmax(z)
        mean = p @ z

        def loss(bias):
            stats = blocks_of(16, hidden, unembed, bias, targets)
            return (g * stats.logprob + h * stats.entropy + s * stats.logsumexp)[0]

        dz = jax.jit(jax.grad(loss))(bias)
        np.testing.assert_allclose(dz.sum(), s, rtol=1e-12)
        variance = p @ (z - mean) ** 2
        np.testing.assert_allclose(dz @ (z - mean), g * (z[targets[0]] - mean) - h * variance, rtol=1e-12)


@implementations
def test_the_loss_doubled_doubles_every_gradient(implementation):
    hidden, unembed, bias, targets = problem()
    stats = partial(everything, implementation, targets=targets)
    once, twice = (gradients(stats, hidden, unembed, bias, factor=factor) for factor in (1.0, 2.0))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), once, twice)


@implementations
@pytest.mark.parametrize("keep", ["some", "none"])
def test_nan_under_the_mask_reaches_no_gradient(implementation, keep):
    hidden, unembed, bias, targets = problem()
    mask = jnp.array([True, False, True, True, False, True]) if keep == "some" else jnp.zeros(6, bool)
    dirty = jnp.where(mask[:, None], hidden, jnp.nan)
    outside = jnp.where(mask, targets, -100)

    stats = partial(everything, implementation, mask=mask)
    got = gradients(partial(stats, targets=outside), dirty, unembed, bias)
    want = gradients(partial(stats, targets=targets), hidden, unembed, bias)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    if keep == "none":
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(got))


@implementations
def test_extreme_logits_have_finite_gradients(implementation):
    hidden, unembed, bias, targets = problem()

    stats = jax.jit(jax.grad(lambda *a: weighted(everything(implementation, *a, targets)), (0, 1, 2)))
    forbidden = bias.at[3:9].set(-jnp.inf)
    for arrays in ((1e4 * hidden, unembed, bias), (hidden, unembed, bias + 1e4), (hidden, unembed, forbidden)):
        for x in jax.tree.leaves(stats(*arrays)):
            assert bool(jnp.isfinite(x).all())


@implementations
def test_an_impossible_target_has_no_gradient(implementation):
    hidden, unembed, _, _ = problem()
    targets = jnp.full(6, 1000)

    def loss(hidden, unembed):
        stats = token_stats(hidden, unembed, targets, outputs=("logprob",), implementation=implementation)
        return jnp.where(jnp.isfinite(stats.logprob), stats.logprob, 0).sum()

    for x in jax.jit(jax.grad(loss, (0, 1)))(hidden, unembed):
        assert not np.asarray(x).any()


@implementations
def test_the_temperature_is_a_constant(implementation):
    hidden, unembed, _, targets = problem()

    def loss(temperature):
        return weighted(token_stats(hidden, unembed, targets, temperature=temperature, implementation=implementation))

    assert float(jax.grad(loss)(0.7)) == 0.0


@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_bfloat16_gradients(rows):
    hidden, unembed, _, targets = problem(n=64, d=32, v=300)
    hidden, table = hidden.astype(jnp.bfloat16), unembed.astype(rows)

    def grads(f, hidden, table):
        return jax.jit(jax.grad(lambda *a: sum(x.sum() for x in jax.tree.leaves(f(*a))), (0, 1)))(hidden, table)

    got = grads(partial(blocks_of, 64, bias=None, targets=targets), hidden, table)
    assert (got[0].dtype, got[1].dtype) == (jnp.bfloat16, jnp.dtype(rows))
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x.astype(jnp.bfloat16), np.float64)) for x in (hidden, table)]
        want = grads(partial(everything, "dense", bias=None, targets=targets), *exact)
    for a, b in zip(got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b)
        assert (a * b).sum() >= 0.99999 * np.linalg.norm(a) * np.linalg.norm(b)


def test_the_error_of_bfloat16_gradients_does_not_grow_with_the_number_of_blocks():
    hidden, unembed, _, targets = problem(n=64, d=32, v=512)
    hidden = hidden.astype(jnp.bfloat16)

    def grads(block):
        stats = partial(blocks_of, block, bias=None, targets=targets)
        return jax.jit(jax.grad(lambda *a: stats(*a).logprob.sum(), (0, 1)))(hidden, unembed)

    exact = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (hidden, unembed)]
    probabilities = scipy.special.softmax(exact[1] @ exact[0].T, axis=0)

    def by_one_rounding(row, weights):
        """A probability half way between two bfloat16 numbers may round to either, as a block's shape changes the order
        of its logit's sum (seen with AMX): then the row moves by that token's state, times one step of the format."""
        steps = row @ exact[0].T / (exact[0] ** 2).sum(axis=1)
        token = np.abs(row - steps[:, None] * exact[0]).max(axis=1).argmin()
        spacing = 2.0 ** (np.floor(np.log2(weights[token])) - 7)
        tie = weights[token] / spacing % 1
        return abs(abs(steps[token]) / spacing - 1) < 1e-3 and abs(tie - 0.5) < 1e-3

    whole = grads(512)
    for block in (8, 64):
        got = grads(block)
        difference = np.asarray(got[1] - whole[1], np.float64)
        (rows,) = np.nonzero((np.abs(difference) > 2e-6).any(axis=1))
        assert len(rows) <= 1 and all(map(by_one_rounding, difference[rows], probabilities[rows]))
        # The gradient of hidden is accumulated in float32 over the blocks and rounded to bfloat16 once: at most one
        # unit in the last place apart, where the two sums fall on different sides of a rounding boundary.
        a, b = (np.asarray(x[0], np.float32) for x in (got, whole))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5)
        assert (a != b).mean() < 0.01


def _loss(hidden, unembed, targets, implementation="tiled"):
    return weighted(token_stats(hidden, unembed, targets, outputs=ALL, implementation=implementation))


def test_vmap_over_every_argument():
    hidden, unembed, _, targets = problem()
    tables = jnp.stack([unembed, unembed[::-1], 2 * unembed])
    many = jnp.stack([hidden, -hidden, hidden[::-1]])
    choices = jnp.stack([targets, targets[::-1], targets])
    grad = jax.jit(jax.grad(_loss, (0, 1)))
    for axes in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        given = [stack if a == 0 else stack[0] for a, stack in zip(axes, (many, tables, choices))]
        got = jax.vmap(grad, in_axes=axes)(*given)
        one = [grad(*(x[i] if a == 0 else x for a, x in zip(axes, given))) for i in range(3)]
        assert_trees_close(got, jax.tree.map(lambda *x: jnp.stack(x), *one), rtol=1e-6)


def test_jit_remat_and_scan_change_nothing():
    hidden, unembed, _, targets = problem()
    want = jax.grad(_loss, (0, 1))(hidden, unembed, targets)
    assert_trees_close(jax.jit(jax.grad(_loss, (0, 1)))(hidden, unembed, targets), want, rtol=1e-6)
    assert_trees_close(jax.grad(jax.checkpoint(_loss), (0, 1))(hidden, unembed, targets), want, rtol=1e-6)

    def scanned(hidden, unembed):
        chunks = hidden.reshape(3, 2, -1), targets.reshape(3, 2)
        _, stats = jax.lax.scan(lambda c, x: (c, token_stats(x[0], unembed, x[1], outputs=ALL)), None, chunks)
        return weighted(jax.tree.map(lambda x: x.reshape(-1), stats))

    assert_trees_close(jax.grad(scanned, (0, 1))(hidden, unembed), want, rtol=1e-6)


def test_forward_mode_is_the_oracles():
    hidden, unembed, _, targets = problem()
    tangent = jnp.ones_like(hidden)
    _, got = jax.jvp(lambda h: _loss(h, unembed, targets, "dense"), (hidden,), (tangent,))
    want = jnp.vdot(jax.grad(_loss)(hidden, unembed, targets, "dense"), tangent)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda h: _loss(h, unembed, targets), (hidden,), (tangent,))
