"""Hugging Face folders of decoders without the unembedding, both ways: the part that transformers' AutoModel holds.

What encodes sentences has no use for the unembedding, and on disk it may be there (a language model's folder) or not
(an embedding model's). Its config says `tie_embeddings`, which is how a decoder has no such parameter of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxlm.models import decoder, hf, hf_config, hf_files, hf_names
from jaxlm.models.config import DecoderConfig
from jaxlm.models.spec import Spec
from jaxlm.typing import Params

# What transformers puts before the names of a decoder that stands under a head.
PREFIX, OTHER_PREFIXES = "model.", {"gpt2": "transformer."}
ARCHITECTURES = {
    family: name.removesuffix("ForCausalLM") + "Model" for family, name in hf_config.ARCHITECTURES.items()
} | {"gemma3_text": "Gemma3TextModel", "gpt2": "GPT2Model"}
HEADS = ("lm_head.", "score.")


def spec(cfg: DecoderConfig) -> Spec:
    """Every parameter of `decoder.spec` but an unembedding of its own."""
    return decoder.spec(_headless(cfg))


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder config of a Hugging Face folder, without an unembedding of its own."""
    return _headless(hf.load_config(folder))


def load(folder: str | Path, *, dtype: Any = jnp.float32, shardings: Any = None) -> tuple[DecoderConfig, Params]:
    """(config, parameters) of a Hugging Face folder, strict on names and shapes; heads in it are left out.

    dtype, shardings, errors: as in `jaxlm.models.hf.load`.
    """
    family, cfg = hf.read_config(folder)
    cfg = _headless(cfg)
    return cfg, hf_files.read(Path(folder), _layout(family, cfg), dtype=dtype, shardings=shardings)


def save(folder: str | Path, params: Params, cfg: DecoderConfig, *, dtype: Any = None, tokenizer: Any = None) -> None:
    """Writes a folder that AutoModel and `load` read, of the plainest family that fits.

    dtype, tokenizer, errors: as in `jaxlm.models.hf.save`.
    """
    cfg = _headless(cfg)
    family = hf_config.infer_family(cfg)

    def config(stored: str) -> dict[str, Any]:
        # Without a head in its name: sentence-transformers takes the last token of what is called a language model.
        # A language model made of this folder must not take the embeddings for a head.
        named = {"architectures": [ARCHITECTURES[family]], "tie_word_embeddings": False}
        return hf_config.write(cfg, family, stored) | named | hf.special_ids(tokenizer)

    hf_files.write(
        Path(folder), params, _layout(family, cfg), config, dtype=dtype, max_shard_bytes=hf.MAX_SHARD_BYTES,
        tokenizer=tokenizer,
    )  # fmt: skip


def _headless(cfg: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(cfg, tie_embeddings=True)


def _layout(family: str, cfg: DecoderConfig) -> hf_files.Layout:
    prefix = OTHER_PREFIXES.get(family, PREFIX)
    rows = [row._replace(tensor=row.tensor.removeprefix(prefix)) for row in hf_names.rows(family, cfg)]
    return hf_files.Layout(decoder.spec(cfg), rows, cfg.num_layers, prefixes=(prefix,), ignored=HEADS)
