"""Tokenizers behind one small protocol: bytes, sentencepiece, and Hugging Face's tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxlm.data.tokenizer_hf import HFTokenizer
from jaxlm.data.tokenizer_sentencepiece import SentencePieceTokenizer

__all__ = ["ByteTokenizer", "HFTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer"]


class Tokenizer(Protocol):
    """Text to ids and back.

    `encode` reads special tokens that are written out in the text, where the tokenizer knows any: prompts and rendered
    templates hold them. `encode_plain` never does: text of documents cannot end itself. `encode_continuation` is
    `encode` for what stands in the middle of a text: nothing is put before it. None of them adds special tokens.
    `token_bytes()[id]` is the length of the text that the token stands for, in UTF-8 bytes; 0 for special tokens.
    `special_tokens` are the texts by the names that chat templates use (bos_token, eos_token, …).
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    chat_template: str | None
    special_tokens: Mapping[str, str]

    def encode(self, text: str) -> np.ndarray: ...

    def encode_plain(self, text: str) -> np.ndarray: ...

    def encode_continuation(self, text: str) -> np.ndarray: ...

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
    special_tokens: Mapping[str, str] = {}

    def encode(self, text: str) -> np.ndarray:
        """The bytes of the text, int32 [n]; no special tokens are added."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    encode_plain = encode_continuation = encode

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


def load_tokenizer(where: str | Path) -> Tokenizer:
    """"bytes", a sentencepiece `.model` file, or a folder with a tokenizer (a run's, or a Hugging Face model's)."""
    if str(where) == "bytes":
        return ByteTokenizer()
    path = Path(where).expanduser()
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
        f"tokenizer {str(where)!r}: expected 'bytes', a sentencepiece .model file, or a folder with tokenizer.json or "
        "tokenizer.model"
    )
