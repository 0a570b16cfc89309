"""What a sentence-transformers folder says beside the weights: pooling, unit length, the longest text. Both ways.

Written are the names that every release of sentence-transformers reads; its newer ones are read, too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.data.tokenizer_hf import HFTokenizer

Pooling = Literal["mean", "cls", "last"]
MODULES, TRANSFORMER, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING, NORMALIZE = "1_Pooling", "2_Normalize"
_FLAGS: dict[Pooling, str] = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
_READ: dict[Any, Pooling] = {flag: name for name, flag in _FLAGS.items()} | {
    "mean": "mean", "cls": "cls", "lasttoken": "last",
}  # fmt: skip


class Settings(NamedTuple):
    """pooling: how a text's states become its vector. unit: vectors are scaled to length 1. max_tokens: longer texts
    are cut there (None: where the model ends)."""

    pooling: Pooling
    unit: bool
    max_tokens: int | None


def read(folder: Path, *, pooling: Pooling | None = None) -> Settings:
    """The settings of a sentence-transformers folder; of a plain Hugging Face folder, no unit length and the mean, or
    of a causal language model (its name says ForCausalLM) the last token: the choices of sentence-transformers.

    pooling: in place of the folder's own. Raises ValueError for what changes vectors and jaxlm does not compute.
    """
    modules = [m["type"].rsplit(".", 1)[-1] for m in _json(folder / MODULES, [])]
    unknown = [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ValueError(f"{folder}/{MODULES}: {', '.join(unknown)} is not supported")
    settings = _json(folder / TRANSFORMER, {})
    if settings.get("do_lower_case"):
        raise ValueError(f"{folder}: do_lower_case is not supported yet ({TRANSFORMER})")
    prompt = _json(folder / PROMPTS, {}).get("default_prompt_name")
    if prompt is not None:
        raise ValueError(f"{folder}: the prompt {prompt!r} is put before every text: not supported yet")
    # Newer releases leave the limit to the tokenizer.
    limit = settings.get("max_seq_length") or _json(folder / "tokenizer_config.json", {}).get("model_max_length")
    return Settings(pooling or _read_pooling(folder), "Normalize" in modules, None if limit is None else int(limit))


def _read_pooling(folder: Path) -> Pooling:
    architecture = (_json(folder / "config.json", {}).get("architectures") or [""])[0]
    default = "lasttoken" if architecture.endswith("ForCausalLM") else "mean"
    config = _json(folder / POOLING / "config.json", {"pooling_mode": default})
    flags = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    mode = config.get("pooling_mode", "none")
    chosen = flags or (mode if isinstance(mode, list) else [mode])
    if len(chosen) != 1 or chosen[0] not in _READ:
        raise ValueError(f"{folder}/{POOLING}: expected one of mean, cls and last token, found {', '.join(chosen)}")
    return _READ[chosen[0]]


def _json(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else absent


@dataclasses.dataclass(frozen=True)
class Beside:
    """All that lies beside the weights, written by the writer of the weights, in one rename. width: of the vectors."""

    tokenizer: HFTokenizer
    settings: Settings
    width: int

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files and those of the settings into the folder."""
        folder, (pooling, unit, max_tokens) = Path(folder), self.settings
        self._save_tokenizer(folder)
        modules = [("", "Transformer"), (POOLING, "Pooling"), *([(NORMALIZE, "Normalize")] if unit else [])]
        listed = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ]
        _write(folder / MODULES, listed)
        _write(folder / TRANSFORMER, {"max_seq_length": max_tokens, "do_lower_case": False})
        _write(folder / PROMPTS, {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"})
        flags = {flag: name == pooling for name, flag in _FLAGS.items()}
        _write(folder / POOLING / "config.json", {"word_embedding_dimension": self.width, **flags})
        if unit:
            _write(folder / NORMALIZE / "config.json", {})  # a folder must hold something to live through git and zip


    def _save_tokenizer(self, folder: Path) -> None:
        """Decoders' tokenizers often name no padding, without which transformers encodes no batch. Any token will do,
        for the mask hides it: the one that jaxlm pads with."""
        self.tokenizer.save(folder)
        names = self.tokenizer.special_tokens
        if "pad_token" not in names and "eos_token" in names:
            path = folder / "tokenizer_config.json"
            _write(path, _json(path, {}) | {"pad_token": names["eos_token"]})

    @property
    def bos_id(self) -> int | None:
        """Of the tokenizer, for config.json; and so the next two."""
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return self.tokenizer.pad_id


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
