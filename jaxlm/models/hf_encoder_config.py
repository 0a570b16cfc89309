"""config.json of Hugging Face encoders to `EncoderConfig` and back; what jaxlm does not compute is refused by name.

Not read, because they change no number here: dropout rates and initialisers (settings of a training), ids of special
tokens, and ModernBERT's classifier_pooling, sparse_prediction, deterministic_flash_attn and reference_compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxlm.models import hf_config
from jaxlm.models.config import EncoderConfig, MaskedLMConfig, RopeConfig

Json = Mapping[str, Any]
Family = Literal["bert", "roberta", "distilbert", "modernbert"]
ARCHITECTURES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "modernbert": "ModernBert"}
GLOBAL_THETA, LOCAL_THETA, GLOBAL_EVERY = 160_000.0, 10_000.0, 3
KINDS = {"full_attention": "global", "sliding_attention": "local"}


def read_config(c: Json) -> tuple[str, EncoderConfig]:
    """(family, encoder config) of a config.json; ValueError for what jaxlm does not compute."""
    family = c.get("model_type")
    if family not in READERS:
        raise ValueError(f"config.json: model_type={family!r} is no encoder; expected one of {', '.join(READERS)}")
    if c.get("position_embedding_type", "absolute") != "absolute" or c.get("sinusoidal_pos_embds"):
        raise ValueError("config.json: only learned absolute positions are supported")
    if c.get("is_decoder"):
        raise ValueError("config.json: is_decoder is set, and an encoder sees both sides of a token")
    return family, READERS[family](c)


def _bert(c: Json, position_offset: int = 0) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=c["vocab_size"], width=c["hidden_size"], num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"], mlp_width=c["intermediate_size"],
        max_length=c["max_position_embeddings"] - position_offset, position_offset=position_offset,
        num_token_types=c.get("type_vocab_size", 2), activation=_activation(c["hidden_act"]),
        norm_eps=c["layer_norm_eps"],
    )  # fmt: skip


def _roberta(c: Json) -> EncoderConfig:
    return _bert(c, c.get("pad_token_id", 1) + 1)


def _distilbert(c: Json) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=c["vocab_size"], width=c["dim"], num_layers=c["n_layers"], num_heads=c["n_heads"],
        mlp_width=c["hidden_dim"], max_length=c["max_position_embeddings"], num_token_types=0,
        activation=_activation(c["activation"]),
    )  # fmt: skip


def _modernbert(c: Json) -> EncoderConfig:
    if "head_dim" in c and c["head_dim"] != c["hidden_size"] // c["num_attention_heads"]:
        raise ValueError(f"config.json: head_dim={c['head_dim']} must be hidden_size / num_attention_heads")
    pattern, rope, rope_local = _pattern(c), _rope(c, "global"), _rope(c, "local")
    local = "local" in pattern
    return EncoderConfig(
        vocab_size=c["vocab_size"], width=c["hidden_size"], num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"], mlp_width=c["intermediate_size"],
        max_length=c["max_position_embeddings"], num_token_types=0,
        activation=_activation(c.get("hidden_activation", "gelu")), norm_eps=c.get("norm_eps", 1e-5),
        norm_placement="pre", norm_bias=c.get("norm_bias", False), attention_bias=c.get("attention_bias", False),
        mlp_bias=c.get("mlp_bias", False), mlp_gated=True, layer_pattern=pattern,
        rope=rope, rope_local=rope_local if local and rope_local != rope else None,
        # local_attention counts both sides: a token sees half of it before itself and half after.
        window=c.get("local_attention", 128) // 2 + 1 if local else None,
    )  # fmt: skip


def read_masked_lm(c: Json) -> MaskedLMConfig | None:
    """The masked-LM head that a checkpoint of this config.json may have; None for one apart from the embeddings."""
    if not c.get("tie_word_embeddings", True):
        return None
    if c["model_type"] == "modernbert":
        activation = _activation(c.get("classifier_activation", "gelu"))
        return MaskedLMConfig(activation, c.get("classifier_bias", False), c.get("decoder_bias", True))
    if c["model_type"] == "roberta":
        return MaskedLMConfig("gelu")  # whatever the blocks have
    return MaskedLMConfig(_activation(c["activation" if c["model_type"] == "distilbert" else "hidden_act"]))


READERS: dict[str, Callable[[Json], EncoderConfig]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
}


def _rope(c: Json, kind: Literal["global", "local"]) -> RopeConfig:
    """The rotation of a kind of layer, from either generation of config files."""
    if c.get("rope_scaling"):
        raise ValueError(f"config.json: rope_scaling={c['rope_scaling']!r} is not supported for encoders, only null")
    name = next(theirs for theirs, ours in KINDS.items() if ours == kind)
    parameters = (c.get("rope_parameters") or {}).get(name) or {}
    scaling = parameters.get("rope_type", "default")
    if scaling != "default":
        raise ValueError(f"config.json: {name} has rope_type={scaling!r}; for encoders only 'default' is supported")
    older = c.get("global_rope_theta", GLOBAL_THETA)
    if kind == "local":
        older = c.get("local_rope_theta", LOCAL_THETA) or older  # null: as the global layers
    return RopeConfig(theta=float(parameters.get("rope_theta", older)))


def _pattern(c: Json) -> tuple[Any, ...]:
    """Which layers are local, as the shortest pattern that repeats."""
    num_layers, every = c["num_hidden_layers"], c.get("global_attn_every_n_layers", GLOBAL_EVERY)
    types = c.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(num_layers)]
    unknown = sorted(set(types) - KINDS.keys())
    if unknown or len(types) != num_layers:
        found = ", ".join(unknown) or f"{len(types)} of them"
        raise ValueError(f"config.json: layer_types must be {num_layers} of {', '.join(KINDS)}; found {found}")
    return hf_config.shortest_pattern([KINDS[t] for t in types])


def _activation(name: str) -> Any:
    if name not in hf_config.ACTIVATIONS:
        expected = ", ".join(hf_config.ACTIVATIONS)
        raise ValueError(f"config.json: the activation {name!r} is not supported; expected one of {expected}")
    return hf_config.ACTIVATIONS[name]


def write_config(cfg: EncoderConfig, family: str, dtype: str) -> dict[str, Any]:
    """config.json of an encoder; ValueError if the family cannot express it."""
    architecture = ARCHITECTURES[family] + ("Model" if cfg.masked_lm is None else "ForMaskedLM")
    out: dict[str, Any] = {"architectures": [architecture], "model_type": family, "dtype": dtype}
    out |= {"torch_dtype": dtype, "vocab_size": cfg.vocab_size, "tie_word_embeddings": True}
    out["max_position_embeddings"] = cfg.max_length + cfg.position_offset
    out |= WRITERS.get(family, _bert_fields)(cfg, _activation_name(cfg.activation))
    computed = {name: getattr(cfg, name) for name in ("dropout", "dtype", "scan_layers", "head")}
    computed["masked_lm"] = None if cfg.masked_lm is None else read_masked_lm(out)
    got = dataclasses.replace(read_config(out)[1], **computed)
    if got != cfg:
        names = [f.name for f in dataclasses.fields(cfg) if getattr(got, f.name) != getattr(cfg, f.name)]
        lost = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in names)
        raise ValueError(f"the family {family!r} cannot express {lost}: name another family, or export is not possible")
    return out


def _activation_name(activation: str) -> str:
    return {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}[activation]


def _bert_fields(cfg: EncoderConfig, activation: str) -> dict[str, Any]:
    return dict(
        hidden_size=cfg.width, num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
        intermediate_size=cfg.mlp_width, type_vocab_size=cfg.num_token_types, hidden_act=activation,
        layer_norm_eps=cfg.norm_eps, pad_token_id=max(cfg.position_offset - 1, 0),
    )  # fmt: skip


def _distilbert_fields(cfg: EncoderConfig, activation: str) -> dict[str, Any]:
    return dict(
        dim=cfg.width, n_layers=cfg.num_layers, n_heads=cfg.num_heads, hidden_dim=cfg.mlp_width,
        activation=activation, sinusoidal_pos_embds=False,
    )  # fmt: skip


def _modernbert_fields(cfg: EncoderConfig, activation: str) -> dict[str, Any]:
    theirs = {ours: name for name, ours in KINDS.items()}
    kinds = [cfg.layer_pattern[i % len(cfg.layer_pattern)] for i in range(cfg.num_layers)]
    ropes = {"global": cfg.rope, "local": cfg.rope_local or cfg.rope}
    thetas = {kind: GLOBAL_THETA if rope is None else rope.theta for kind, rope in ropes.items()}
    out: dict[str, Any] = dict(
        hidden_size=cfg.width, num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
        intermediate_size=cfg.mlp_width, hidden_activation=activation, norm_eps=cfg.norm_eps, norm_bias=cfg.norm_bias,
        attention_bias=cfg.attention_bias, mlp_bias=cfg.mlp_bias, layer_types=[theirs[kind] for kind in kinds],
        rope_parameters={n: {"rope_type": "default", "rope_theta": thetas[kind]} for n, kind in KINDS.items()},
        # For transformers before 5, which does not read the two fields above.
        global_rope_theta=thetas["global"], local_rope_theta=thetas["local"],
    )  # fmt: skip
    if kinds[0] == "global" and cfg.layer_pattern.count("global") == 1:
        out["global_attn_every_n_layers"] = len(cfg.layer_pattern)
    if cfg.masked_lm is not None:
        head = cfg.masked_lm
        out |= dict(classifier_activation=_activation_name(head.activation), classifier_bias=head.dense_bias)
        out["decoder_bias"] = head.vocab_bias
    if cfg.window is not None:
        out["local_attention"] = 2 * (cfg.window - 1)
    # Their defaults are ids of ModernBERT's own vocabulary, which need not be this one.
    return out | {f"{name}_token_id": None for name in ("pad", "bos", "eos", "cls", "sep")}


WRITERS: dict[str, Callable[[EncoderConfig, str], dict[str, Any]]] = {
    "distilbert": _distilbert_fields,
    "modernbert": _modernbert_fields,
}
