"""A Hugging Face tokenizer.json as a tokenizer, without transformers."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.byte_level import byte_level_alphabet

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, with the special tokens and chat template of the files beside it."""

    def __init__(self, folder: str | Path):
        """Reads the folder (or the path of a tokenizer.json); raises ValueError if there is none."""
        folder = Path(folder)
        folder = folder.parent if folder.name == "tokenizer.json" else folder
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer {folder}: expected a folder with tokenizer.json")
        self._read({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()})

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> HFTokenizer:
        """The tokenizer that a folder of these files would hold, tokenizer.json among them."""
        tokenizer = cls.__new__(cls)
        tokenizer._read(dict(files))
        return tokenizer

    def _read(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._json = self._files["tokenizer.json"].decode()
        self._tokenizer = _load(self._json)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        self.special_tokens = _special_tokens(json.loads(self._files.get("special_tokens_map.json", b"{}")) | config)
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        self.mask_id = self._id("mask_token")
        pad = self._id("pad_token")
        self.pad_id = pad if pad is not None else self.eos_id if self.eos_id is not None else 0
        self.chat_template = _chat_template(self._files.get("chat_template.jinja"), config.get("chat_template"))

    def _id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    @functools.cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that are no text ([CLS], [SEP], padding, …), in order: masked-LM training hides none."""
        added = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        named = {self._id(name) for name in self.special_tokens}
        return tuple(sorted(i for i in added | named if i is not None))

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32 [n]: special tokens in the text are read as such, and none is added."""
        return _encode(self._tokenizer, text)

    def encode_plain(self, text: str) -> np.ndarray:
        """Ids of the text, int32 [n], as text throughout: "<|endoftext|>" in a document does not end it."""
        return _encode(self._plain, text)

    def encode_continuation(self, text: str) -> np.ndarray:
        """Ids of text that stands in the middle: if the tokenizer puts a space before every text, it does not here."""
        return _encode(self._without_prefix, text)

    def encode_sentences(self, texts: Sequence[str], *, max_tokens: int) -> list[np.ndarray]:
        """Ids of each text, int32, between the tokenizer's own special tokens, all together at most max_tokens.

        What encoders read: [CLS] … [SEP] for BERT. A longer text is cut at its end.
        """
        tokenizer = _load(self._json)
        tokenizer.enable_truncation(max_tokens)
        return [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(list(texts))]

    @functools.cached_property
    def _plain(self) -> Any:
        tokenizer = _load(self._json)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _without_prefix(self) -> Any:
        spec = json.loads(self._json)
        parts = {name: _drop_prefix(spec.get(name)) for name in ("normalizer", "pre_tokenizer")}
        if all(parts[name] == spec.get(name) for name in parts):
            return self._tokenizer
        return _load(json.dumps(spec | parts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; special tokens vanish."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes per token, int32 [V]; 0 for special tokens.

        Exact for byte-level vocabularies (GPT-2, Llama 3, Qwen) and for byte-fallback ones (Llama 2, Gemma), up to what
        the tokenizer itself changes in the text: Unicode normalisation, and a space put before it. A WordPiece
        vocabulary drops spaces, and they are not counted.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        spec = json.loads(self._json)
        alphabet = byte_level_alphabet() if _is_byte_level(spec) else None
        mark = "##" if spec["model"]["type"] == "WordPiece" else ""
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes[i] = _num_bytes(token.removeprefix(mark), alphabet)
        for i, added in self._tokenizer.get_added_tokens_decoder().items():  # written as they are, in every vocabulary
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes

    def fingerprint(self) -> str:
        """A hash of all its files: special tokens and the chat template decide what is trained on, too."""
        digest = hashlib.sha256()
        for name in sorted(self._files):
            digest.update(name.encode() + self._files[name])
        return "tokenizers:" + digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Writes the files it was read from, byte for byte."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)


def _load(spec: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("reading tokenizer.json needs the extra: pip install 'jaxlm[hf]'") from error

    tokenizer = tokenizers.Tokenizer.from_str(spec)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _encode(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {name: config.get(name) for name in SPECIAL}
    texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _is_byte_level(spec: dict[str, Any]) -> bool:
    stages = [spec.get("pre_tokenizer") or {}, spec.get("decoder") or {}]
    for stage in stages:
        stages += [*stage.get("pretokenizers", ()), *stage.get("decoders", ())]
    return any(stage.get("type") == "ByteLevel" for stage in stages)


def _num_bytes(token: str, alphabet: dict[str, int] | None) -> int:
    if alphabet is not None and all(c in alphabet for c in token):
        return len(token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("\u2581", " ").encode())


def _drop_prefix(stage: Any) -> Any:
    """The stage of a tokenizer.json, so changed that it puts no space before the text."""
    kind = stage.get("type") if isinstance(stage, dict) else None
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {k: v for k, v in stage.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return stage | {"add_prefix_space": False}
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in stage else "pretokenizers"
        return stage | {name: [s for s in map(_drop_prefix, stage[name]) if s is not None]}
    return stage


def _chat_template(file: bytes | None, config: Any) -> str | None:
    if file is not None:
        return file.decode()
    if isinstance(config, list):  # several named templates: the one called "default"
        return next((t["template"] for t in config if t.get("name") == "default"), None)
    return config
