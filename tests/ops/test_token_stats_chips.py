"""What token_stats does otherwise for the chip that it is traced for: blocks, rounding, and what is not set to zero."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.platform import compiling_for
from jaxlm.ops.token_stats import token_stats
from jaxlm.ops.token_stats.head import Head, unembed_rows
from jaxlm.ops.token_stats.tiled import default_block, default_rows, tiled

CHIP = SimpleNamespace(device_kind="TPU v5 lite")
PLAIN = dict(temperature=None, soft_cap=None, outputs=("logprob", "entropy"))


def test_blocks_never_starve_a_tpu():
    with compiling_for("tpu", [CHIP]):
        assert [default_block(rows, 4096) for rows in (512, 4096, 8192, 65_536)] == [8192, 2048, 1024, 1024]
        assert [default_block(rows, 4096, 4) for rows in (512, 4096, 8192, 65_536)] == [8192, 8192, 4096, 1024]
        assert default_rows(8192, masked=True) == 1024
    with compiling_for("tpu", [SimpleNamespace(device_kind="TPU v6 lite")]):
        assert [default_rows(n, masked=True) for n in (8192, 65_536)] == [2048, 4096]


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_masked_gradient_on_a_tpu_starts_from_nothing_that_was_set(monkeypatch, kept):
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, unembed = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (21, 4))
    bias, targets, mask = jnp.arange(21.0), jnp.arange(6) * 3, jnp.arange(6) < kept

    def total(*x):
        stats = tiled(x[0], x[1], targets, mask=mask, bias=x[2], rows=2, block=8, **PLAIN)
        return jnp.sum(jnp.where(mask, stats.logprob + stats.entropy, 0))

    def gradient(*x):
        return jax.jit(jax.grad(lambda *x: total(*x), (0, 1, 2)))(*x)

    want = gradient(hidden, unembed, bias)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    with compiling_for("tpu", [CHIP]):
        got = gradient(hidden, unembed, bias)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_block_of_a_wide_unembed_is_narrow():
    with compiling_for("gpu"):
        assert [default_block(1024, width) for width in (1024, 4096, 16_384)] == [49_152, 16_384, 4096]
        assert default_block(1024, 5120) == 13_056  # a multiple of 128: products of other widths are slow


def test_unembed_is_rounded_on_a_tpu_as_anywhere():
    special = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 3.4e38, -3.4e38, 1e-39, 1.00390625, 1.01171875])
    unembed = jnp.concatenate([special, 10 * jax.random.normal(jax.random.key(0), (4086,))])[:, None]
    head = Head(jnp.ones((1, 1), jnp.bfloat16), unembed, None, None)
    with compiling_for("tpu", [CHIP]):
        assert "reduce_precision" in str(jax.make_jaxpr(lambda: unembed_rows(head, 0, 4096))())
        got = unembed_rows(head, 0, 4096)
    np.testing.assert_array_equal(got.view(jnp.uint16), unembed.astype(jnp.bfloat16).view(jnp.uint16))


def test_derivatives_where_the_gradient_of_unembed_is_not_filled_with_zeros_first():
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, unembed = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (2100, 4))
    targets = jnp.arange(6) * 300

    def total(hidden, unembed):
        stats = token_stats(hidden, unembed, targets, implementation="tiled")
        return jnp.sum(stats.logprob + stats.entropy)

    def penalty(*x):
        return jnp.square(jax.grad(total, 1)(*x)).sum()

    def every(*x):
        mapped = jax.vmap(jax.grad(total, 1), (0, None))(x[0][None], x[1])
        return jax.grad(total, (0, 1))(*x), jax.grad(penalty, (0, 1))(*x), mapped

    want = every(hidden, unembed)
    with compiling_for("tpu", [CHIP]):
        assert " empty[" in str(jax.make_jaxpr(jax.grad(total, 1))(hidden, unembed))
        got = every(hidden, unembed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
