"""Masked language modelling: BERT's rule as shares, what is never chosen, and the loss against its formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import mask_tokens, masked_lm

V, MASK = 500, 4
SPECIAL = (0, 1, 2, 3, MASK)
RULE = dict(mask_id=MASK, vocab_size=V, special_ids=SPECIAL)


def rows(shape=(8, 4096)):
    return jnp.asarray(np.random.default_rng(0).integers(0, V, shape))


def test_the_shares_are_berts():
    """Within four standard deviations of a binomial."""
    tokens = rows()
    masked = mask_tokens(tokens, jax.random.key(0), **RULE)
    plain = ~np.isin(tokens, SPECIAL)
    chosen, read, was = np.asarray(masked.chosen), np.asarray(masked.tokens), np.asarray(tokens)
    assert masked.tokens.dtype == tokens.dtype
    np.testing.assert_array_equal(read[~chosen], was[~chosen])

    def near(count, of, share):
        assert abs(count - of * share) < 4 * np.sqrt(of * share * (1 - share)), (count / of, share)

    n = chosen.sum()
    near(n, plain.sum(), 0.15)
    near((read == MASK)[chosen].sum(), n, 0.8 + 0.1 / V)
    near((read == was)[chosen].sum(), n, 0.1 + 0.1 / V)
    other = chosen & (read != MASK) & (read != was)
    assert read[other].min() < 20 and read[other].max() > V - 20 and len(np.unique(read[other])) > 200


def test_special_tokens_and_padding_are_never_chosen():
    tokens, keep = rows((4, 64)), jnp.arange(64) < jnp.array([[64], [10], [1], [0]])
    masked = mask_tokens(tokens, jax.random.key(1), **RULE, mask=keep, rate=1.0)
    np.testing.assert_array_equal(masked.chosen, ~np.isin(tokens, SPECIAL) & np.asarray(keep))
    assert not mask_tokens(tokens, jax.random.key(1), **RULE, rate=0.0).chosen.any()
    assert mask_tokens(tokens, jax.random.key(1), mask_id=MASK, vocab_size=V, special_ids=(), rate=1.0).chosen.all()


def test_a_row_draws_from_its_own_key():
    tokens, keys = rows((4, 64)), jax.random.split(jax.random.key(2), 4)
    whole = mask_tokens(tokens, keys, **RULE)
    for a, b in zip(mask_tokens(tokens[2:], keys[2:], **RULE), whole, strict=True):
        np.testing.assert_array_equal(a, b[2:])
    np.testing.assert_array_equal(mask_tokens(tokens, jax.random.key(2), **RULE).tokens, whole.tokens)
    assert (mask_tokens(tokens, jax.random.key(3), **RULE).chosen != whole.chosen).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rate=15), r"rate must be a share in \[0, 1\], found 15"),
        (dict(mask_id=V), r"must be in \[0, 500\), found \[500\]"),
        (dict(special_ids=(-1,)), r"found \[-1\]: is vocab_size right"),
        (dict(mask=jnp.ones((2, 2), bool)), r"found tokens \(2, 3\) and mask \(2, 2\)"),
        (dict(key=jax.random.PRNGKey(0)), "key must be one jax.random.key, or one for each of 2 rows; found uint32"),
        (dict(key=jax.random.split(jax.random.key(0), 3)), r"of shape \(3,\)"),
        (dict(tokens=jnp.ones(3, int)), r"must be \[B, T\], found tokens \(3,\)"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mask_tokens(**(dict(tokens=jnp.ones((2, 3), int), key=jax.random.key(0)) | RULE | change))


def problem():
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(4, 5, 8)).astype(np.float32)
    unembed, bias = rng.normal(size=(19, 8)).astype(np.float32), rng.normal(size=19).astype(np.float32)
    return hidden, unembed, bias, rng.integers(0, 19, (4, 5)), rng.random((4, 5)) < 0.4


def test_the_loss_is_its_formula_and_adds_up_over_a_batch():
    hidden, unembed, bias, targets, chosen = problem()
    z = hidden.astype(np.float64) @ unembed.T + bias
    nll = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[..., None], -1)[..., 0]
    total, weight, metrics = masked_lm(hidden, unembed, targets, chosen, bias=bias)
    np.testing.assert_allclose(total, nll[chosen].sum(), rtol=1e-6)
    assert weight == chosen.sum() and metrics["masked_lm"] == (total, weight)
    parts = [masked_lm(hidden[i], unembed, targets[i], chosen[i], bias=bias) for i in (slice(1), slice(1, 4))]
    np.testing.assert_allclose(sum(p[0] for p in parts), total, rtol=1e-6)
    assert sum(p[1] for p in parts) == weight


def test_with_nothing_chosen_loss_and_gradient_are_zero():
    hidden, unembed, bias, targets, chosen = problem()
    hidden[:] = np.nan
    none = np.zeros_like(chosen)
    grad = jax.grad(lambda h, u: masked_lm(h, u, targets, none, bias=bias)[0], argnums=(0, 1))(hidden, unembed)
    assert masked_lm(hidden, unembed, targets, none)[:2] == (0.0, 0.0) and not any(np.any(g) for g in grad)
