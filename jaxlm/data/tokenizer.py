"""Tokenizers behind one small protocol: bytes, sentencepiece, and Hugging Face's tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlm.data.byte_level import byte_level_alphabet


class Tokenizer(Protocol):
    """Text to ids and back. `token_bytes()[id]` is the length of the text that the token stands for, in UTF-8 bytes."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    chat_template: str | None

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...

    def token_bytes(self) -> np.ndarray: ...

    def fingerprint(self) -> str: ...

    def save(self, folder: str | Path) -> None: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, then begin 256, end 257 and padding 258: lossless on any text, nothing to train.

    >>> t = ByteTokenizer()
    >>> t.encode("é").tolist(), t.decode([195, 169, 257])
    ([195, 169], 'é')
    """

    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258
    chat_template: str | None = None

    def encode(self, text: str) -> np.ndarray:
        """The bytes of the text, int32 [n]; no special tokens are added."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; special tokens vanish and broken UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """1 for every byte and 0 for the special tokens, int32 [259]."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def fingerprint(self) -> str:
        """Names what the ids mean."""
        return "bytes"

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.bytes.json`, by which `load_tokenizer` knows the folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.bytes.json").write_text('{"tokenizer": "bytes"}\n')


class SentencePieceTokenizer:
    """A sentencepiece model (`tokenizer.model`). With the options of `jaxlm tokenizer` it is lossless."""

    chat_template: str | None = None

    def __init__(self, path: str | Path):
        """Loads the model file; raises ValueError if there is none."""
        import sentencepiece

        if not Path(path).is_file():
            raise ValueError(f"tokenizer {path}: no such sentencepiece model (train one with `jaxlm tokenizer`)")
        self._model = Path(path).read_bytes()
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self.vocab_size = self._sp.vocab_size()
        self.bos_id, self.eos_id = _id_or_none(self._sp.bos_id()), _id_or_none(self._sp.eos_id())
        self.pad_id = max(self._sp.pad_id(), 0)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32 [n]; no special tokens are added, and none is read out of the text."""
        return np.array(self._sp.encode(text), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; control tokens (begin, end, padding) vanish."""
        return self._sp.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes per piece, the word mark counted as the space it stands for; 0 for control tokens, int32 [V]."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self._sp.is_byte(i):
                sizes[i] = 1
            elif not (self._sp.is_control(i) or self._sp.is_unknown(i) or self._sp.is_unused(i)):
                sizes[i] = len(self._sp.id_to_piece(i).replace("\u2581", " ").encode())
        return sizes

    def fingerprint(self) -> str:
        """A hash of the model file."""
        return "sentencepiece:" + hashlib.sha256(self._model).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.model`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(self._model)


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, with the special tokens and chat template of the files beside it."""

    FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

    def __init__(self, folder: str | Path):
        """Reads the folder (or the path of a tokenizer.json); raises ValueError if there is none."""
        import tokenizers

        folder = Path(folder)
        folder = folder.parent if folder.name == "tokenizer.json" else folder
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer {folder}: expected a folder with tokenizer.json")
        self._files = {name: (folder / name).read_bytes() for name in self.FILES if (folder / name).is_file()}
        self._tokenizer = tokenizers.Tokenizer.from_str(self._files["tokenizer.json"].decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        config = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        special = json.loads(self._files.get("special_tokens_map.json", b"{}")) | config
        self.bos_id = self._special(special.get("bos_token"))
        self.eos_id = self._special(special.get("eos_token"))
        pad = self._special(special.get("pad_token"))
        self.pad_id = pad if pad is not None else self.eos_id if self.eos_id is not None else 0
        self.chat_template = _chat_template(self._files.get("chat_template.jinja"), config.get("chat_template"))

    def _special(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self._tokenizer.token_to_id(content)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32 [n]; no special tokens are added (a rendered chat template holds its own)."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; special tokens vanish."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes per token, int32 [V]; 0 for special tokens.

        Exact for byte-level vocabularies (GPT-2, Llama 3, Qwen) and byte-fallback ones (Llama 2, Gemma) up to a
        normaliser's changes to the text; for WordPiece, continuation marks are not counted.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        byte_level = '"ByteLevel"' in self._files["tokenizer.json"].decode()
        alphabet = byte_level_alphabet()
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in special:
                continue
            if byte_level and all(c in alphabet for c in token):
                sizes[i] = len(token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace("\u2581", " ").removeprefix("##").encode())
        return sizes

    def fingerprint(self) -> str:
        """A hash of tokenizer.json."""
        return "tokenizers:" + hashlib.sha256(self._files["tokenizer.json"]).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Writes the files it was read from, byte for byte."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(where: str | Path) -> Tokenizer:
    """"bytes", a sentencepiece `.model` file, or a folder that holds a tokenizer (a run's, or a Hugging Face model's)."""
    if str(where) == "bytes":
        return ByteTokenizer()
    path = Path(where)
    if path.is_file() and path.name != "tokenizer.json":
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.bytes.json").is_file():
        return ByteTokenizer()
    # A Llama 2 folder holds both files; tokenizer.json is the one with the special tokens.
    if path.name == "tokenizer.json" or (path / "tokenizer.json").is_file():
        return HFTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    raise ValueError(
        f"tokenizer {where!r}: expected 'bytes', a sentencepiece .model file, or a folder with tokenizer.json or "
        "tokenizer.model"
    )


def _id_or_none(i: int) -> int | None:
    return i if i >= 0 else None


def _chat_template(file: bytes | None, config: Any) -> str | None:
    if file is not None:
        return file.decode()
    if isinstance(config, list):  # several named templates: the one called "default"
        return next((t["template"] for t in config if t.get("name") == "default"), None)
    return config
