"""config.json of Hugging Face models to `DecoderConfig` and back, family by family."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.models.config import DecoderConfig, RopeConfig

Json = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "phi3": "Phi3ForCausalLM",
}


def read(config: Json) -> tuple[str, DecoderConfig]:
    """(family, decoder config) of a config.json; ValueError for what jaxlm does not compute."""
    if "text_config" in config:  # a multimodal wrapper: its text part alone
        config = config["text_config"]
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type={family!r} is not supported; expected one of {', '.join(ARCHITECTURES)}"
        )
    for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        found = config.get(name)
        if found is not None and bool(found) != causal:
            raise ValueError(f"config.json: {name}={found!r} lets tokens see later ones; decoders are causal here")
    if family == "gpt2":
        return family, _read_gpt2(config)
    return family, DecoderConfig(**_common(config, family), **_FAMILY[family](config))


def _common(c: Json, family: str) -> dict[str, Any]:
    heads = c["num_attention_heads"]
    ropes = _ropes(c, family)
    return dict(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        mlp_width=c["intermediate_size"],
        max_length=c["max_position_embeddings"],
        norm_eps=c["rms_norm_eps"],
        activation=_activation(c.get("hidden_act") or c.get("hidden_activation")),
        tie_embeddings=c.get("tie_word_embeddings", family.startswith("gemma")),
        rope=ropes[0],
        rope_local=ropes[1],
        **_pattern(c, family),
    )


def _activation(name: str | None) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act={name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _pattern(c: Json, family: str) -> dict[str, Any]:
    """The windows: which layers are local, as the shortest pattern that repeats."""
    window = c.get("sliding_window")
    if family in ("qwen2", "qwen3") and not c.get("use_sliding_window"):
        window = None
    if window is None:
        return {}
    types = c.get("layer_types")
    n = c["num_hidden_layers"]
    if types is None and family == "gemma2":
        types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n)]
    elif types is None and family == "gemma3_text":
        every = c.get("sliding_window_pattern", 6)
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]
    elif types is None and family in ("qwen2", "qwen3"):
        types = ["sliding_attention" if i >= c["max_window_layers"] else "full_attention" for i in range(n)]
    elif types is None:
        types = ["sliding_attention"] * n
    kinds = ["local" if t == "sliding_attention" else "global" for t in types]
    return {"layer_pattern": shortest_pattern(kinds), "window": window} if "local" in kinds else {}


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest beginning of the layers' kinds that gives them all when repeated.

    >>> shortest_pattern(["global", "local", "global", "local", "global"])
    ('global', 'local')
    """
    n = len(kinds)
    period = next(p for p in range(1, n + 1) if all(kinds[i] == kinds[i % p] for i in range(n)))
    return tuple(kinds[:period])


def _ropes(c: Json, family: str) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotations of global and local layers, from either generation of config files."""
    parameters = c.get("rope_parameters")
    if parameters and "full_attention" in parameters:
        return _rope(parameters["full_attention"], c), _rope(parameters["sliding_attention"], c)
    flat = dict(parameters or c.get("rope_scaling") or {})
    flat.setdefault("rope_theta", c.get("rope_theta", 1e6 if family == "gemma3_text" else 1e4))
    local = RopeConfig(theta=float(c.get("rope_local_base_freq", 1e4))) if family == "gemma3_text" else None
    return _rope(flat, c), local


def _rope(p: Json, c: Json) -> RopeConfig:
    kind = p.get("rope_type") or p.get("type") or "default"
    base = dict(
        theta=float(p.get("rope_theta", c.get("rope_theta", 1e4))),
        rotary_fraction=float(p.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))),
    )
    original = p.get("original_max_position_embeddings") or c.get("original_max_position_embeddings")
    factor = p.get("attention_factor")
    attention = {} if factor is None else {"attention_factor": float(factor)}
    if kind == "default":
        return RopeConfig(**base)
    if kind == "linear":
        return RopeConfig(**base, scaling="linear", factor=float(p["factor"]))
    if kind == "llama3":
        return RopeConfig(
            **base,
            scaling="llama3",
            factor=float(p["factor"]),
            low_freq_factor=float(p["low_freq_factor"]),
            high_freq_factor=float(p["high_freq_factor"]),
            original_length=original,
        )
    if kind == "yarn" and not (p.get("mscale") or p.get("mscale_all_dim")) and p.get("truncate", True):
        betas = {name: float(p.get(name) or default) for name, default in (("beta_fast", 32), ("beta_slow", 1))}
        original = original or c["max_position_embeddings"]
        return RopeConfig(
            **base, **attention, **betas, scaling="yarn", factor=float(p["factor"]), original_length=original
        )
    if kind in ("longrope", "su"):
        return RopeConfig(
            **base,
            **attention,
            scaling="longrope",
            original_length=original,
            short_factor=tuple(map(float, p["short_factor"])),
            long_factor=tuple(map(float, p["long_factor"])),
        )
    raise ValueError(
        f"config.json: rope parameters {dict(p)!r} are not supported; expected rope_type default, linear, llama3, yarn "
        "(without mscale) or longrope"
    )


def _gemma(c: Json) -> dict[str, Any]:
    return dict(
        norm_offset=1.0,
        norm_placement="sandwich",
        embed_scale=math.sqrt(c["hidden_size"]),
        attention_scale=c["query_pre_attn_scalar"] ** -0.5,
        attention_soft_cap=c.get("attn_logit_softcapping"),
        final_soft_cap=c.get("final_logit_softcapping"),
        **_attention_bias(c),
    )


def _attention_bias(c: Json) -> dict[str, Any]:
    bias = bool(c.get("attention_bias", False))
    return dict(qkv_bias=bias, attention_out_bias=bias)


_FAMILY = {
    "llama": lambda c: _attention_bias(c) | {"mlp_bias": bool(c.get("mlp_bias", False))},
    "mistral": lambda c: {},
    "qwen2": lambda c: {"qkv_bias": True},
    "qwen3": lambda c: _attention_bias(c) | {"qk_norm": "head"},
    "gemma2": _gemma,
    "gemma3_text": lambda c: _gemma(c) | {"qk_norm": "head"},
    "olmo2": lambda c: _attention_bias(c) | {"norm_placement": "post", "qk_norm": "full"},
    "phi3": lambda c: {},
}


def _read_gpt2(c: Json) -> DecoderConfig:
    for field, needed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if c.get(field, needed) != needed:
            raise ValueError(f"config.json: {field}={c[field]!r} is not supported; expected {needed}")
    width, heads = c["n_embd"], c["n_head"]
    return DecoderConfig(
        vocab_size=c["vocab_size"],
        width=width,
        num_layers=c["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=c.get("n_inner") or 4 * width,
        max_length=c["n_positions"],
        norm="layer",
        norm_eps=c["layer_norm_epsilon"],
        activation=_activation(c["activation_function"]),  # type: ignore[arg-type]
        mlp_gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True),
        rope=None,
        learned_positions=True,
    )


def infer_family(cfg: DecoderConfig) -> str:
    """The plainest family that has everything the config asks for."""
    if cfg.learned_positions:
        return "gpt2"
    if cfg.norm_placement == "sandwich":
        return "gemma3_text" if cfg.qk_norm else "gemma2"
    if cfg.norm_placement == "post":
        return "olmo2"
    if cfg.qk_norm == "head":
        return "qwen3"
    if cfg.qkv_bias and not cfg.attention_out_bias:
        return "qwen2"
    if cfg.rope is not None and (cfg.rope.scaling == "longrope" or cfg.rope.rotary_fraction < 1):
        return "phi3"
    return "mistral" if cfg.window is not None else "llama"


def write(cfg: DecoderConfig, family: str, dtype: str) -> dict[str, Any]:
    """The config.json of a decoder in that family; ValueError if reading it back would not give `cfg`."""
    out = _write_gpt2(cfg) if family == "gpt2" else _write_llama_like(cfg, family)
    out |= {"architectures": [ARCHITECTURES[family]], "model_type": family, "dtype": dtype, "torch_dtype": dtype}
    computed = {name: getattr(cfg, name) for name in ("dropout", "dtype", "remat", "scan_layers")}
    got = dataclasses.replace(read(out)[1], **computed)  # those say how it is computed, not what it is
    if got != cfg:
        fields = [f.name for f in dataclasses.fields(cfg) if getattr(got, f.name) != getattr(cfg, f.name)]
        lost = ", ".join(f"{f}={getattr(cfg, f)!r}" for f in fields)
        raise ValueError(f"the family {family!r} cannot express {lost}: name another family, or export is not possible")
    return out


def _write_llama_like(cfg: DecoderConfig, family: str) -> dict[str, Any]:
    inverse = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    out: dict[str, Any] = dict(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        intermediate_size=cfg.mlp_width,
        max_position_embeddings=cfg.max_length,
        rms_norm_eps=cfg.norm_eps,
        hidden_act=inverse[cfg.activation],
        hidden_activation=inverse[cfg.activation],
        tie_word_embeddings=cfg.tie_embeddings,
        attention_bias=cfg.qkv_bias,
        mlp_bias=cfg.mlp_bias,
        sliding_window=cfg.window,
    )
    if family in ("qwen2", "qwen3"):
        out |= {"use_sliding_window": cfg.window is not None, "max_window_layers": 0}
    if cfg.window is not None and family not in ("mistral", "phi3"):
        kinds = [cfg.layer_pattern[i % len(cfg.layer_pattern)] for i in range(cfg.num_layers)]
        out["layer_types"] = ["sliding_attention" if k == "local" else "full_attention" for k in kinds]
    if family.startswith("gemma"):
        out |= {
            "query_pre_attn_scalar": _scalar((cfg.attention_scale or cfg.head_dim**-0.5) ** -2),
            "attn_logit_softcapping": cfg.attention_soft_cap,
            "final_logit_softcapping": cfg.final_soft_cap,
        }
    return out | _write_rope(cfg, family)


def _scalar(x: float) -> float | int:
    """256.00000000000006 back to the 256 it came from."""
    return round(x) if abs(x - round(x)) < 1e-9 * x else x


def _write_rope(cfg: DecoderConfig, family: str) -> dict[str, Any]:
    """In the older form, which both generations of readers understand."""
    rope = cfg.rope
    assert rope is not None
    out: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.rotary_fraction != 1.0:
        out["partial_rotary_factor"] = rope.rotary_fraction
    if family == "gemma3_text" and cfg.rope_local is not None:
        out["rope_local_base_freq"] = cfg.rope_local.theta
    if rope.scaling is None:
        return out | {"rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    fields = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "beta_fast", "beta_slow"),
        "longrope": ("short_factor", "long_factor"),
    }[rope.scaling]
    scaling |= {f: list(v) if isinstance(v := getattr(rope, f), tuple) else v for f in fields}
    if rope.original_length is not None:
        scaling["original_max_position_embeddings"] = rope.original_length
        out["original_max_position_embeddings"] = rope.original_length
    if rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    return out | {"rope_scaling": scaling}


def _write_gpt2(cfg: DecoderConfig) -> dict[str, Any]:
    return dict(
        vocab_size=cfg.vocab_size,
        n_embd=cfg.width,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        n_inner=cfg.mlp_width,
        n_positions=cfg.max_length,
        n_ctx=cfg.max_length,
        layer_norm_epsilon=cfg.norm_eps,
        activation_function={"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}[cfg.activation],
        tie_word_embeddings=cfg.tie_embeddings,
    )
