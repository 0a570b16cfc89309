"""Every family that the decoder knows, narrowed to a few thousand parameters but with all its peculiarities."""

import dataclasses

import jax
import pytest

from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig, RopeConfig
from jaxlm.models.spec import flatten, init, map_spec

LLAMA2 = DecoderConfig(
    vocab_size=29, width=16, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=4, mlp_width=24, max_length=32,
    tie_embeddings=False,
)  # fmt: skip
GQA = dataclasses.replace(LLAMA2, num_kv_heads=2)
GEMMA = dict(
    norm_offset=1.0, norm_placement="sandwich", activation="gelu_tanh", tie_embeddings=True, embed_scale=4.0,
    attention_scale=0.3, window=3,
)  # fmt: skip
LLAMA3_ROPE = RopeConfig(5e5, scaling="llama3", factor=8.0, original_length=16)
LONGROPE = RopeConfig(
    scaling="longrope", rotary_fraction=0.5, original_length=8, short_factor=(1.1,), long_factor=(3.0,)
)

FAMILIES = {
    "llama2": LLAMA2,
    "llama3": dataclasses.replace(GQA, rope=LLAMA3_ROPE),
    "smollm": dataclasses.replace(GQA, tie_embeddings=True),
    "mistral": dataclasses.replace(GQA, layer_pattern=("local",), window=3),
    "qwen2": dataclasses.replace(GQA, qkv_bias=True),
    "qwen2_yarn": dataclasses.replace(GQA, rope=RopeConfig(scaling="yarn", factor=4.0, original_length=8)),
    "qwen3": dataclasses.replace(GQA, qk_norm="head", head_dim=8),
    "olmo2": dataclasses.replace(GQA, norm_placement="post", qk_norm="full"),
    "phi3": dataclasses.replace(LLAMA2, rope=LONGROPE),
    "gemma2": dataclasses.replace(
        GQA, **GEMMA, layer_pattern=("local", "global"), attention_soft_cap=5.0, final_soft_cap=3.0
    ),
    "gemma3": dataclasses.replace(
        GQA, **GEMMA, num_layers=8, layer_pattern=("local",) * 5 + ("global",), qk_norm="head",
        rope=RopeConfig(1e6, scaling="linear", factor=8.0), rope_local=RopeConfig(1e4),
    ),
    "gpt2": dataclasses.replace(
        LLAMA2, norm="layer", activation="gelu_tanh", mlp_gated=False, qkv_bias=True, attention_out_bias=True,
        mlp_bias=True, tie_embeddings=True, rope=None, learned_positions=True,
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request) -> DecoderConfig:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def families() -> dict[str, DecoderConfig]:
    return FAMILIES


@pytest.fixture(scope="session")
def make_params():
    """Parameters far enough from the initial ones that biases, norms and every layer matter."""

    def make(cfg, seed=0):
        params = init(jax.random.key(seed), decoder.spec(cfg))
        noise = init(jax.random.key(seed + 1), map_spec(_noisy, decoder.spec(cfg)))
        return jax.tree.map(jax.numpy.add, params, noise)

    return make


def _noisy(param):
    return dataclasses.replace(param, init=lambda key, shape, dtype: 0.3 * jax.random.normal(key, shape, dtype))


@pytest.fixture(scope="session")
def paths():
    return lambda tree: {name: leaf.shape for name, leaf in flatten(tree).items()}
