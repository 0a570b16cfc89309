"""The CPU's matrix product against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import matmul as ops


def plain(x, kernel):
    return jnp.matmul(x, kernel.astype(x.dtype))


def value_and_gradients(product, x, kernel, dy):
    out, pull = jax.vjp(product, x, kernel)
    return out, *pull(dy)


@pytest.mark.parametrize("rows", [(7,), (2, 3), (1, 1), ()], ids=str)
def test_equals_the_plain_product(rows):
    x, dy = jax.random.normal(jax.random.key(0), (*rows, 5)), jax.random.normal(jax.random.key(1), (*rows, 4))
    kernel = jax.random.normal(jax.random.key(2), (5, 4))
    for got, want in zip(
        value_and_gradients(ops._cpu_matmul, x, kernel, dy), value_and_gradients(plain, x, kernel, dy)
    ):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_gradient_of_a_float32_kernel_is_not_rounded():
    x, dy = (jax.random.normal(jax.random.key(i), (64, 8), jnp.bfloat16) for i in (0, 1))
    kernel = jax.random.normal(jax.random.key(2), (8, 8))
    out, dx, dkernel = value_and_gradients(ops._cpu_matmul, x, kernel, dy)
    assert out.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(dkernel, np.float64(x).T @ np.float64(dy), atol=1e-5)
    np.testing.assert_allclose(np.float32(out), np.float32(plain(x, kernel)), rtol=1 / 128)


def test_second_derivatives():
    x, kernel = jax.random.normal(jax.random.key(0), (3, 2)), jax.random.normal(jax.random.key(1), (2, 4))

    def gradient_norm(product):
        return lambda kernel: jnp.sum(jax.grad(lambda k: jnp.sum(jnp.tanh(product(x, k))))(kernel) ** 2)

    np.testing.assert_allclose(
        jax.grad(gradient_norm(ops._cpu_matmul))(kernel), jax.grad(gradient_norm(plain))(kernel), atol=1e-6
    )


def test_several_devices_take_the_plain_product():
    assert jax.device_count() > 1 and not ops._on_one_cpu()
    jax.jvp(ops.matmul, (jnp.ones((2, 3)), jnp.ones((3, 1))), (jnp.ones((2, 3)), jnp.ones((3, 1))))
