"""What encodes sentences, whichever kind of model it is: the one place that chooses by the type of the config.

An encoder (BERT to ModernBERT) sees a sentence from both sides; a decoder (Llama, Qwen, Mistral, Gemma, …) is causal,
and used without its unembedding, as transformers' AutoModel has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxlm.models import decoder, encoder, hf_backbone, hf_config, hf_encoder, hf_encoder_config
from jaxlm.models.config import DecoderConfig, EncoderConfig
from jaxlm.models.decoder import identity
from jaxlm.models.spec import Spec
from jaxlm.typing import Array, Constrain, Float, Int, Key, Params

AnyConfig = EncoderConfig | DecoderConfig


def spec(cfg: AnyConfig) -> Spec:
    """Every parameter of the model; of a decoder, without an unembedding of its own."""
    return hf_backbone.spec(cfg) if isinstance(cfg, DecoderConfig) else encoder.spec(cfg)


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    cfg: AnyConfig,
    segments: Int[Array, "B T"],
    key: Key[Array, "..."] | None = None,
    constrain: Constrain = identity,
) -> Float[Array, "B T D"]:
    """Hidden states after the last block and the final norm, [B, T, D] in cfg.dtype, for `jaxlm.models.pooling`.

    segments: 1 for a token, 0 for padding, on either side. key, constrain: as in `encoder.forward`.
    """
    run = decoder.forward if isinstance(cfg, DecoderConfig) else encoder.forward
    return run(params, tokens, cfg=cfg, segments=segments, key=key, constrain=constrain).hidden


def check_pooling(cfg: AnyConfig, pooling: str) -> None:
    """Raises ValueError for a pooling that would tell nothing about the sentence."""
    if pooling == "cls" and isinstance(cfg, DecoderConfig):
        raise ValueError(
            "pooling='cls' takes the first token's state, and in a causal model (a decoder) that token has seen no "
            "other: expected pooling 'last' or 'mean'"
        )


def load_config(folder: str | Path) -> AnyConfig:
    """The config of a Hugging Face folder; ValueError if it holds no model of either kind."""
    found: AnyConfig = _files(Path(folder)).load_config(folder)
    return found


def load(folder: str | Path) -> tuple[AnyConfig, Params]:
    """(config, parameters in float32) of a Hugging Face folder, strict on names and shapes; see `hf_encoder.load`."""
    found: tuple[AnyConfig, Params] = _files(Path(folder)).load(folder)
    return found


def save(folder: str | Path, params: Params, cfg: AnyConfig, *, tokenizer: Any) -> None:
    """Writes a folder that transformers and `load` read, whole or not at all; tokenizer as in `hf.save`."""
    if isinstance(cfg, DecoderConfig):
        hf_backbone.save(folder, params, cfg, tokenizer=tokenizer)
    else:
        hf_encoder.save(folder, params, cfg, tokenizer=tokenizer)


def _files(folder: Path) -> ModuleType:
    """The module that reads the folder."""
    path = folder / "config.json"
    if not path.is_file():
        inside = folder / "encoder"
        hint = f"that of a run is {inside}" if (inside / "config.json").is_file() else "see that the path is right"
        raise ValueError(f"{folder}: no config.json; expected the folder of a Hugging Face model: {hint}")
    family = json.loads(path.read_text()).get("model_type")
    if family in hf_encoder_config.READERS:
        return hf_encoder
    if family in hf_config.ARCHITECTURES:
        return hf_backbone
    known = ", ".join([*hf_encoder_config.READERS, *hf_config.ARCHITECTURES])
    raise ValueError(f"{path}: model_type={family!r} is no encoder or decoder of jaxlm; expected one of {known}")
