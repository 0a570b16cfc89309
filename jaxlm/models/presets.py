"""Named configs of published models. The sizes are facts of their model cards and config files, cited per family.

from jaxlm.models.presets import preset
config.model = dataclasses.asdict(preset("llama-3.2-1b", dtype="bfloat16", remat="full"))
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from jaxlm.models.config import DecoderConfig, RopeConfig


def _llama(vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any) -> DecoderConfig:
    settings: dict[str, Any] = dict(head_dim=width // heads, tie_embeddings=False)
    return DecoderConfig(
        vocab_size=vocab,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_width=mlp,
        **(settings | more),
    )


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(theta=5e5, scaling="llama3", factor=factor, original_length=8192)


def _gemma2(width: int, layers: int, heads: int, kv_heads: int, mlp: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=256_000, width=width, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=256,
        mlp_width=mlp, max_length=8192, norm_eps=1e-6, norm_offset=1.0, norm_placement="sandwich",
        activation="gelu_tanh", embed_scale=math.sqrt(width), layer_pattern=("local", "global"), window=4096,
        attention_scale=256**-0.5, attention_soft_cap=50.0, final_soft_cap=30.0,
    )  # fmt: skip


def _gpt2(width: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=50_257, width=width, num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=width // heads,
        mlp_width=4 * width, max_length=1024, norm="layer", activation="gelu_tanh", mlp_gated=False, qkv_bias=True,
        attention_out_bias=True, mlp_bias=True, rope=None, learned_positions=True,
    )  # fmt: skip


_QWEN2 = dict(qkv_bias=True, norm_eps=1e-6, rope=RopeConfig(theta=1e6), max_length=32_768)
_QWEN3 = dict(qk_norm="head", norm_eps=1e-6, rope=RopeConfig(theta=1e6), max_length=40_960, head_dim=128)
_OLMO2 = dict(norm_placement="post", qk_norm="full", norm_eps=1e-6, rope=RopeConfig(theta=5e5), max_length=4096)
_SMOL = dict(tie_embeddings=True, max_length=2048)
_SMOL2 = dict(tie_embeddings=True, max_length=8192, rope=RopeConfig(theta=1e5))

PRESETS: dict[str, DecoderConfig] = {
    # Touvron et al., 2023, arXiv 2307.09288; card meta-llama/Llama-2-7b.
    "llama-2-7b": _llama(32_000, 4096, 32, 32, 32, 11_008, max_length=4096),
    # Grattafiori et al., 2024, arXiv 2407.21783; cards meta-llama/Meta-Llama-3-8B, Llama-3.1-8B, -70B,
    # Llama-3.2-1B, -3B.
    "llama-3-8b": _llama(128_256, 4096, 32, 32, 8, 14_336, max_length=8192, rope=RopeConfig(theta=5e5)),
    "llama-3.1-8b": _llama(128_256, 4096, 32, 32, 8, 14_336, max_length=131_072, rope=_llama3_rope(8.0)),
    "llama-3.1-70b": _llama(128_256, 8192, 80, 64, 8, 28_672, max_length=131_072, rope=_llama3_rope(8.0)),
    "llama-3.2-1b": _llama(
        128_256, 2048, 16, 32, 8, 8192, max_length=131_072, rope=_llama3_rope(32.0), tie_embeddings=True
    ),
    "llama-3.2-3b": _llama(
        128_256, 3072, 28, 24, 8, 8192, max_length=131_072, rope=_llama3_rope(32.0), tie_embeddings=True
    ),
    # Jiang et al., 2023, arXiv 2310.06825; cards mistralai/Mistral-7B-v0.1 and -v0.3.
    "mistral-7b-v0.1": _llama(
        32_000, 4096, 32, 32, 8, 14_336, max_length=32_768, layer_pattern=("local",), window=4096
    ),
    "mistral-7b-v0.3": _llama(32_768, 4096, 32, 32, 8, 14_336, max_length=32_768, rope=RopeConfig(theta=1e6)),
    # Yang et al., 2024, arXiv 2407.10671 and 2412.15115; cards Qwen/Qwen2-0.5B, Qwen2.5-0.5B, -1.5B, -7B.
    "qwen2-0.5b": _llama(151_936, 896, 24, 14, 2, 4864, tie_embeddings=True, **(_QWEN2 | {"max_length": 131_072})),
    "qwen2.5-0.5b": _llama(151_936, 896, 24, 14, 2, 4864, tie_embeddings=True, **_QWEN2),
    "qwen2.5-1.5b": _llama(151_936, 1536, 28, 12, 2, 8960, tie_embeddings=True, **(_QWEN2 | {"max_length": 131_072})),
    "qwen2.5-7b": _llama(152_064, 3584, 28, 28, 4, 18_944, **(_QWEN2 | {"max_length": 131_072})),
    # Yang et al., 2025, arXiv 2505.09388; cards Qwen/Qwen3-0.6B, -1.7B, -8B.
    "qwen3-0.6b": _llama(151_936, 1024, 28, 16, 8, 3072, tie_embeddings=True, **_QWEN3),
    "qwen3-1.7b": _llama(151_936, 2048, 28, 16, 8, 6144, tie_embeddings=True, **_QWEN3),
    "qwen3-8b": _llama(151_936, 4096, 36, 32, 8, 12_288, **_QWEN3),
    # Gemma team, 2024, arXiv 2408.00118; cards google/gemma-2-2b, -9b.
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 9216),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 14_336),
    # Gemma team, 2025, arXiv 2503.19786; card google/gemma-3-1b-pt.
    "gemma-3-1b": DecoderConfig(
        vocab_size=262_144,
        width=1152,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_width=6912,
        max_length=32_768,
        norm_eps=1e-6,
        norm_offset=1.0,
        norm_placement="sandwich",
        qk_norm="head",
        activation="gelu_tanh",
        embed_scale=math.sqrt(1152),
        rope=RopeConfig(theta=1e6),
        rope_local=RopeConfig(theta=1e4),
        layer_pattern=("local",) * 5 + ("global",),
        window=512,
        attention_scale=256**-0.5,
    ),  # fmt: skip
    # OLMo team, 2024, arXiv 2501.00656; cards allenai/OLMo-2-0425-1B, OLMo-2-1124-7B.
    "olmo-2-1b": _llama(100_352, 2048, 16, 16, 16, 8192, **_OLMO2),
    "olmo-2-7b": _llama(100_352, 4096, 32, 32, 32, 11_008, **_OLMO2),
    # Radford et al., 2019; cards openai-community/gpt2, gpt2-medium.
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    # Cards HuggingFaceTB/SmolLM-135M, -360M, -1.7B; Allal et al., 2025, arXiv 2502.02737 and SmolLM2-135M.
    "smollm-135m": _llama(49_152, 576, 30, 9, 3, 1536, **_SMOL),
    "smollm-360m": _llama(49_152, 960, 32, 15, 5, 2560, **_SMOL),
    "smollm-1.7b": _llama(49_152, 2048, 24, 32, 32, 8192, **_SMOL),
    "smollm2-135m": _llama(49_152, 576, 30, 9, 3, 1536, **_SMOL2),
    # Abdin et al., 2024, arXiv 2404.14219; card microsoft/Phi-3-mini-4k-instruct.
    "phi-3-mini-4k": _llama(32_064, 3072, 32, 32, 32, 8192, max_length=4096, layer_pattern=("local",), window=2047),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """The config of a published model, with fields changed; ValueError, naming the nearest, for an unknown name.

    >>> preset("gpt2", dropout=0.1).width
    768
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, 0.5) or sorted(PRESETS)
        raise ValueError(f"unknown preset {name!r}; did you mean {', '.join(near)}?")
    return dataclasses.replace(PRESETS[name], **changes)
