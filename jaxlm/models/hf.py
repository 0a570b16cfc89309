"""Hugging Face checkpoints of decoders, both ways: safetensors and config.json, with numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxlm.models import hf_config, hf_files, hf_names
from jaxlm.models.config import DecoderConfig
from jaxlm.models.decoder import spec
from jaxlm.typing import Params

MAX_SHARD_BYTES = 5 * 10**9


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder config of a Hugging Face folder; ValueError if it holds no config.json or an unsupported model."""
    return read_config(folder)[1]


def read_config(folder: str | Path) -> tuple[str, DecoderConfig]:
    """(family, decoder config) of a Hugging Face folder; errors as in `load_config`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; expected the folder of a Hugging Face model")
    return hf_config.read(json.loads(path.read_text()))


def load(folder: str | Path, *, dtype: Any = jnp.float32, shardings: Any = None) -> tuple[DecoderConfig, Params]:
    """(config, parameters) of a Hugging Face folder, strict on names and shapes.

    dtype: what the parameters are cast to; None keeps the file's. shardings: a tree of shardings like the parameters;
    each process then reads only the layers' tensors that its devices need, one at a time. Raises ValueError naming
    every missing, unexpected or misshapen tensor.
    """
    family, cfg = read_config(folder)
    return cfg, hf_files.read(Path(folder), _layout(family, cfg), dtype=dtype, shardings=shardings)


def _layout(family: str, cfg: DecoderConfig) -> hf_files.Layout:
    rows = hf_names.rows(family, cfg)
    copies = {"lm_head.weight": "embed/table"} if cfg.tie_embeddings else {}
    return hf_files.Layout(spec(cfg), rows, cfg.num_layers, prefixes=("transformer.",), copies=copies)


def save(
    folder: str | Path,
    params: Params,
    cfg: DecoderConfig,
    *,
    family: str | None = None,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Any = None,
) -> None:
    """Writes a folder that transformers and `load` read: safetensors, config.json, and the tokenizer's files.

    family: a model_type of Hugging Face (None: the plainest one that fits). dtype: of the stored tensors (None: as the
    parameters are). tokenizer: anything with `save(folder)`. The folder appears in one rename, whole or not at all; it
    must not exist yet. Raises ValueError if it does, or if the family cannot express the config.
    """
    family = family or hf_config.infer_family(cfg)

    def config(stored: str) -> dict[str, Any]:
        return hf_config.write(cfg, family, stored) | special_ids(tokenizer)

    hf_files.write(
        Path(folder), params, _layout(family, cfg), config, dtype=dtype, max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
    )  # fmt: skip


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """The fields of config.json that name special tokens; None where the tokenizer has no such id.

    Families have defaults of their own, which may lie outside this vocabulary: hence always written.
    """
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
