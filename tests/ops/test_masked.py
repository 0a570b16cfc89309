"""Masked reductions: deleting an entry and masking it are the same, for values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.masked import masked_count, masked_max, masked_mean, masked_sum

MASK = np.array([[True, False, True], [False, False, False]])
X = np.array([[1.5, np.nan, -4.0], [np.inf, -np.inf, np.nan]], np.float32)


def test_masking_is_deleting():
    assert float(masked_sum(X, MASK)) == -2.5
    assert float(masked_mean(X, MASK)) == -1.25
    assert float(masked_count(X, MASK)) == 2.0
    assert float(masked_max(X, MASK)) == 1.5


def test_along_an_axis_and_all_masked():
    assert masked_sum(X, MASK, axis=1).tolist() == [-2.5, 0.0]
    assert masked_mean(X, MASK, axis=1).tolist() == [-1.25, 0.0]
    assert masked_count(X, MASK, axis=1).tolist() == [2.0, 0.0]
    assert masked_max(X, MASK, axis=1).tolist() == [1.5, -np.inf]


def test_no_mask_is_every_entry():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert float(masked_sum(x, None)) == 15.0 and float(masked_count(x, None)) == 6.0
    np.testing.assert_array_equal(masked_mean(x, None, axis=0), x.mean(0))
    np.testing.assert_array_equal(masked_max(x, None, axis=0), x.max(0))


def test_a_mask_broadcasts():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    rows = np.array([[True], [False]])
    assert float(masked_sum(x, rows)) == 3.0 and float(masked_mean(x, rows)) == 1.0


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_gradients_are_zero_under_the_mask_and_never_nan(reduce):
    grad = jax.grad(lambda x: reduce(x, MASK))(X)
    want = MASK / (1 if reduce is masked_sum else MASK.sum())
    np.testing.assert_array_equal(grad, want)
    assert not np.asarray(jax.grad(lambda x: reduce(x, np.zeros_like(MASK)))(X)).any()


def test_narrow_types_are_summed_in_float32():
    x = jnp.full(4096, 1.0, jnp.bfloat16)  # a bfloat16 sum stalls at 256
    assert masked_sum(x, None).dtype == jnp.float32 and float(masked_sum(x, None)) == 4096.0
