"""Hugging Face checkpoints of encoders, both ways: BERT (and MiniLM, which shares its form), RoBERTa, DistilBERT,
ModernBERT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxlm.models import hf_files
from jaxlm.models.config import EncoderConfig
from jaxlm.models.encoder import spec
from jaxlm.models.hf_encoder_config import Family, read_config, read_masked_lm, write_config
from jaxlm.models.hf_encoder_names import MASKED_LM, OTHER_HEADS, PREFIX, TABLE
from jaxlm.models.spec import flatten
from jaxlm.typing import Params

POOLER = "pooler.dense.weight"


def load_config(folder: str | Path) -> EncoderConfig:
    """The encoder config of a Hugging Face folder; `head` and `masked_lm` say which heads the checkpoint has."""
    return _read(Path(folder))[1]


def load(folder: str | Path, *, dtype: Any = jnp.float32, shardings: Any = None) -> tuple[EncoderConfig, Params]:
    """(config, parameters) of a Hugging Face folder, strict on names and shapes.

    The head of a masked language model is read if it shares the embeddings; heads of other tasks are left out.

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
    chosen = family or _infer_family(cfg)

    def config(stored: str) -> dict[str, Any]:
        written, pad = write_config(cfg, chosen, stored), getattr(tokenizer, "pad_id", None)
        # RoBERTa's padding id says where its positions begin, so it is not the tokenizer's to choose.
        return written if pad is None or chosen == "roberta" else written | {"pad_token_id": pad}

    hf_files.write(
        Path(folder), params, layout(chosen, cfg), config, dtype=dtype, max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
    )  # fmt: skip


def _infer_family(cfg: EncoderConfig) -> Family:
    if cfg.rope is not None:
        return "modernbert"
    return "roberta" if cfg.position_offset else "bert" if cfg.num_token_types else "distilbert"


def layout(family: str, cfg: EncoderConfig) -> hf_files.Layout:
    """Where each parameter lies in a checkpoint of the family; beside a head, the encoder's names have a prefix."""
    prefix, head = PREFIX[family], MASKED_LM[family]
    table, copies = TABLE[family], {}
    if cfg.masked_lm is not None:
        table, copies = [row._replace(tensor=prefix + row.tensor) for row in table] + head.rows, head.copies
    have = flatten(spec(cfg))
    rows = [row for row in table if all(path in have for path in row.paths)]
    missing = have.keys() - {path for row in rows for path in row.paths}
    if missing:
        raise ValueError(f"the family {family!r} has no tensors for {', '.join(sorted(missing))}: choose another")
    others = OTHER_HEADS if cfg.masked_lm is not None else (*OTHER_HEADS, *head.prefixes)
    ignored = (*others, "embeddings.position_ids", prefix + "embeddings.position_ids")
    return hf_files.Layout(spec(cfg), rows, cfg.num_layers, prefixes=(prefix,), ignored=ignored, copies=copies)


def _read(folder: Path) -> tuple[str, EncoderConfig]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; expected the folder of a Hugging Face model")
    settings = json.loads(path.read_text())
    family, cfg = read_config(settings)
    files = hf_files.Tensors(folder, (PREFIX[family],))
    pooler = family in ("bert", "roberta") and files.find(POOLER) is not None
    # ModernBERT's classifiers have the same dense layer and norm under the same names.
    guesses = files.find(MASKED_LM[family].rows[0].tensor) is not None and files.find("classifier.weight") is None
    return family, dataclasses.replace(cfg, head=pooler, masked_lm=read_masked_lm(settings) if guesses else None)
