"""What implementations are chosen by: devices that are not here, and the switch of kernels."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxlm.ops.attention import attention
from jaxlm.ops.platform import (
    compiled_ahead,
    compiling_for,
    device_kind,
    devices,
    kernels_wanted,
    platform,
    use_kernels,
)
from jaxlm.ops.token_stats import mosaic_gpu, token_stats

CHIP = SimpleNamespace(device_kind="TPU v5 lite")
H100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
B200 = SimpleNamespace(device_kind="NVIDIA B200", compute_capability="10.0")


@pytest.fixture
def no_kernels():
    use_kernels(False)
    yield
    use_kernels(True)


def takes_kernel(name: str, *given) -> bool:
    """Whether `token_stats` is traced with one."""
    operands = jnp.ones((128, 128), jnp.bfloat16), jnp.ones((256, 128), jnp.bfloat16), jnp.zeros(128, int)
    with compiling_for(name, given):
        return "_in_kernel" in str(jax.make_jaxpr(lambda *x: token_stats(*x).logprob)(*operands))


def test_inside_it_is_the_target_and_outside_this_process():
    assert (platform(), devices(), compiled_ahead()) == (jax.default_backend(), jax.devices(), False)
    with compiling_for("tpu", [CHIP]):
        assert (platform(), devices(), compiled_ahead()) == ("tpu", (CHIP,), True)
        assert device_kind() == CHIP.device_kind
    with compiling_for("tpu"):
        assert device_kind() == ""
    assert not compiled_ahead()


def test_one_chip_takes_the_kernel_and_several_or_who_knows_how_many_do_not():
    assert takes_kernel("tpu", CHIP)
    assert not takes_kernel("tpu", CHIP, CHIP) and not takes_kernel("tpu")


@pytest.mark.skipif(not mosaic_gpu.supported(), reason="needs jax 0.11 or newer")
def test_a_gpu_that_is_not_here_takes_the_kernel_if_it_is_a_hopper():
    assert takes_kernel("gpu", H100)
    assert not takes_kernel("gpu", B200) and not takes_kernel("gpu")


def test_without_kernels_xla_makes_everything(no_kernels):
    assert not kernels_wanted() and not takes_kernel("tpu", CHIP)
    q, positions = jnp.ones((1, 256, 2, 128), jnp.bfloat16), jnp.arange(256)[None]

    def attend(x):
        return attention(x, x, x, q_positions=positions, k_positions=positions, scale=1.0, in_order=True)

    with compiling_for("tpu", [CHIP]):
        assert "pallas_call" not in str(jax.make_jaxpr(attend)(q))
        use_kernels(True)
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: attend(x))(q))
