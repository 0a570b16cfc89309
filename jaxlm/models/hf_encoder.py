"""Hugging Face checkpoints of encoders, both ways: BERT, RoBERTa, DistilBERT and what shares their form (MiniLM)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from jaxlm.models import hf_config, hf_files
from jaxlm.models.encoder import EncoderConfig, spec
from jaxlm.models.hf_names import Row, linear_rows, norm_rows
from jaxlm.models.spec import flatten
from jaxlm.typing import Params

Family = Literal["bert", "roberta", "distilbert"]
ARCHITECTURES = {"bert": "BertModel", "roberta": "RobertaModel", "distilbert": "DistilBertModel"}
# Heads of other tasks, which checkpoints of masked language models and classifiers carry beside the encoder.
OTHER_HEADS = ("cls.", "lm_head.", "classifier.", "vocab_", "pre_classifier.", "qa_outputs.")

_EMBEDDINGS = [
    Row("embeddings.word_embeddings.weight", ("embed/table",), "plain"),
    Row("embeddings.position_embeddings.weight", ("positions/table",), "plain"),
    Row("embeddings.token_type_embeddings.weight", ("token_types/table",), "plain"),
    *norm_rows("embeddings.LayerNorm", "embed_norm"),
]
_B = "encoder.layer.{i}."
_BERT = [
    *_EMBEDDINGS,
    *linear_rows(_B + "attention.self.query", "layers/attn/q"),
    *linear_rows(_B + "attention.self.key", "layers/attn/k"),
    *linear_rows(_B + "attention.self.value", "layers/attn/v"),
    *linear_rows(_B + "attention.output.dense", "layers/attn/out"),
    *norm_rows(_B + "attention.output.LayerNorm", "layers/attn_norm"),
    *linear_rows(_B + "intermediate.dense", "layers/mlp/up"),
    *linear_rows(_B + "output.dense", "layers/mlp/down"),
    *norm_rows(_B + "output.LayerNorm", "layers/mlp_norm"),
    *linear_rows("pooler.dense", "head"),
]
_D = "transformer.layer.{i}."
_DISTILBERT = [
    *_EMBEDDINGS,
    *linear_rows(_D + "attention.q_lin", "layers/attn/q"),
    *linear_rows(_D + "attention.k_lin", "layers/attn/k"),
    *linear_rows(_D + "attention.v_lin", "layers/attn/v"),
    *linear_rows(_D + "attention.out_lin", "layers/attn/out"),
    *norm_rows(_D + "sa_layer_norm", "layers/attn_norm"),
    *linear_rows(_D + "ffn.lin1", "layers/mlp/up"),
    *linear_rows(_D + "ffn.lin2", "layers/mlp/down"),
    *norm_rows(_D + "output_layer_norm", "layers/mlp_norm"),
]
TABLE: dict[str, list[Row]] = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTILBERT}
HEAD = "pooler.dense.weight"


def load_config(folder: str | Path) -> EncoderConfig:
    """The encoder config of a Hugging Face folder; `head` is whether the checkpoint has BERT's pooler."""
    return _read(Path(folder))[1]


def load(folder: str | Path, *, dtype: Any = jnp.float32, shardings: Any = None) -> tuple[EncoderConfig, Params]:
    """(config, parameters) of a Hugging Face folder, strict on names and shapes; heads of other tasks are left out.

    dtype, shardings: as in `jaxlm.models.hf.load`. Raises ValueError naming every missing, unexpected or misshapen
    tensor. A checkpoint's dropout is a setting of its training: the config has 0.
    """
    family, cfg = _read(Path(folder))
    return cfg, hf_files.read(Path(folder), layout(family, cfg), dtype=dtype, shardings=shardings)


def save(
    folder: str | Path,
    params: Params,
    cfg: EncoderConfig,
    *,
    family: Family | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Any = None,
) -> None:
    """Writes a folder that transformers and `load` read; arguments and errors as in `jaxlm.models.hf.save`."""
    chosen = family or ("roberta" if cfg.position_offset else "bert" if cfg.num_token_types else "distilbert")
    hf_files.write(
        Path(folder), params, layout(chosen, cfg), lambda stored: write_config(cfg, chosen, stored), dtype=dtype,
        max_shard_bytes=max_shard_bytes, tokenizer=tokenizer,
    )  # fmt: skip


def layout(family: str, cfg: EncoderConfig) -> hf_files.Layout:
    """Where each parameter lies in a checkpoint of the family."""
    have = flatten(spec(cfg))
    rows = [row for row in TABLE[family] if all(path in have for path in row.paths)]
    missing = have.keys() - {path for row in rows for path in row.paths}
    if missing:
        raise ValueError(f"the family {family!r} has no tensors for {', '.join(sorted(missing))}: choose another")
    ignored = (*OTHER_HEADS, "embeddings.position_ids", f"{family}.embeddings.position_ids")
    return hf_files.Layout(spec(cfg), rows, cfg.num_layers, prefixes=(f"{family}.",), ignored=ignored)


def _read(folder: Path) -> tuple[str, EncoderConfig]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; expected the folder of a Hugging Face model")
    family, cfg = read_config(json.loads(path.read_text()))
    files = hf_files.Tensors(folder, (f"{family}.",))
    return family, dataclasses.replace(cfg, head=family != "distilbert" and files.find(HEAD) is not None)


def read_config(c: Mapping[str, Any]) -> tuple[str, EncoderConfig]:
    """(family, encoder config) of a config.json; ValueError for what jaxlm does not compute."""
    family = c.get("model_type")
    if family not in TABLE:
        raise ValueError(f"config.json: model_type={family!r} is no encoder; expected one of {', '.join(TABLE)}")
    if c.get("position_embedding_type", "absolute") != "absolute" or c.get("sinusoidal_pos_embds"):
        raise ValueError("config.json: only learned absolute positions are supported")
    if c.get("is_decoder"):
        raise ValueError("config.json: is_decoder is set, and an encoder sees both sides of a token")
    if family == "distilbert":
        return family, EncoderConfig(
            vocab_size=c["vocab_size"], width=c["dim"], num_layers=c["n_layers"], num_heads=c["n_heads"],
            mlp_width=c["hidden_dim"], max_length=c["max_position_embeddings"], num_token_types=0,
            activation=_activation(c["activation"]),
        )  # fmt: skip
    offset = c.get("pad_token_id", 1) + 1 if family == "roberta" else 0
    return family, EncoderConfig(
        vocab_size=c["vocab_size"], width=c["hidden_size"], num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"], mlp_width=c["intermediate_size"],
        max_length=c["max_position_embeddings"] - offset, position_offset=offset,
        num_token_types=c.get("type_vocab_size", 2), activation=_activation(c["hidden_act"]),
        norm_eps=c["layer_norm_eps"],
    )  # fmt: skip


def _activation(name: str) -> Any:
    if name not in hf_config.ACTIVATIONS:
        expected = ", ".join(hf_config.ACTIVATIONS)
        raise ValueError(f"config.json: the activation {name!r} is not supported; expected one of {expected}")
    return hf_config.ACTIVATIONS[name]


def write_config(cfg: EncoderConfig, family: str, dtype: str) -> dict[str, Any]:
    """config.json of an encoder; ValueError if the family cannot express it."""
    activation = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}[cfg.activation]
    out: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family, "dtype": dtype}
    out |= {"torch_dtype": dtype, "vocab_size": cfg.vocab_size}
    out["max_position_embeddings"] = cfg.max_length + cfg.position_offset
    if family == "distilbert":
        out |= dict(
            dim=cfg.width, n_layers=cfg.num_layers, n_heads=cfg.num_heads, hidden_dim=cfg.mlp_width,
            activation=activation, sinusoidal_pos_embds=False,
        )  # fmt: skip
    else:
        out |= dict(
            hidden_size=cfg.width, num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
            intermediate_size=cfg.mlp_width, type_vocab_size=cfg.num_token_types, hidden_act=activation,
            layer_norm_eps=cfg.norm_eps, pad_token_id=max(cfg.position_offset - 1, 0),
        )  # fmt: skip
    computed = {name: getattr(cfg, name) for name in ("dropout", "dtype", "scan_layers", "head")}
    got = dataclasses.replace(read_config(out)[1], **computed)
    if got != cfg:
        names = [f.name for f in dataclasses.fields(cfg) if getattr(got, f.name) != getattr(cfg, f.name)]
        lost = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in names)
        raise ValueError(f"the family {family!r} cannot express {lost}: name another family, or export is not possible")
    return out
