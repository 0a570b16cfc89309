"""What the compiled gradient of a scanned decoder holds, read from XLA's own account."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_the_backward_pass_keeps_no_second_copy_of_the_layers(remat):
    cfg = DecoderConfig(
        vocab_size=64, width=128, num_layers=8, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=512, remat=remat
    )
    params = specs.abstract(decoder.spec(cfg))
    layers = sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(params["layers"]))
    tokens = jnp.zeros((1, 16), jnp.int32)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(decoder.forward(p, tokens, cfg=cfg).hidden)))
    temporary = gradient.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert temporary < layers / 2
