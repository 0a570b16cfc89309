"""Activations times a kernel, with both gradients as products that a CPU runs at full speed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.ops.platform import platform
from jaxlm.typing import Array, Float


def matmul(x: Float[Array, "*rows D"], kernel: Float[Array, "D F"]) -> Float[Array, "*rows F"]:
    """The product in x's dtype; the kernel is rounded to it first.

        y = x kernel

    x: [..., D]. kernel: [D, F], any float dtype. Result: [..., F] in x's dtype, accumulated in float32.
    Numerics: on one CPU the gradient of a float32 kernel is not rounded on its way, even when x is bfloat16, and
    forward mode (jvp) is not available; elsewhere this is `jnp.matmul`.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((2, 3)), jnp.full((3, 1), 2.0)).tolist()
    [[6.0], [6.0]]
    """
    return _cpu_matmul(x, kernel) if _on_one_cpu() else jnp.matmul(x, kernel.astype(x.dtype))


def _on_one_cpu() -> bool:
    # Split over simulated devices, the pieces of `transposed` would travel between them.
    return platform() == "cpu" and jax.device_count() == 1


@jax.custom_vjp
def _cpu_matmul(x: Array, kernel: Array) -> Array:
    return _dot(x, kernel.astype(x.dtype)).astype(x.dtype)


def _cpu_matmul_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _cpu_matmul(x, kernel), (x, kernel)


def _cpu_matmul_bwd(operands: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = operands
    # Without the barrier, what computed x and dy is fused into the products, and computed again for every tile of them.
    rows, drows = jax.lax.optimization_barrier((x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])))
    dx = _dot(drows, kernel.astype(dy.dtype).T).astype(x.dtype)
    turned = transposed(rows) if x.dtype == jnp.bfloat16 else rows.T
    return dx.reshape(x.shape), _dot(turned, drows).astype(kernel.dtype)


_cpu_matmul.defvjp(_cpu_matmul_fwd, _cpu_matmul_bwd)


def _dot(a: Array, b: Array) -> Array:
    # Asked for a bfloat16 result, XLA up to jax 0.10 multiplies in float32, at half the speed.
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def transposed(x: Float[Array, "N D"]) -> Float[Array, "D N"]:
    """x.T as an array of its own, to be the first operand of a product.

    XLA folds a plain transpose into the product; a CPU product that contracts the leading axis of its first operand
    then runs bfloat16 in float32.
    """
    half = x.shape[0] // 2
    return jnp.concatenate([x[:half].T, x[half:].T], axis=1)
