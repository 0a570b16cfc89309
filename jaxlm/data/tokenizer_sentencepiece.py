"""A sentencepiece model as a tokenizer."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORD_MARK = "\u2581"  # stands for a space inside pieces
_PROBE = "  a  b\n\tc \n"


class SentencePieceTokenizer:
    """A sentencepiece model (`tokenizer.model`).

    A model trained by `jaxlm tokenizer` is lossless: decode(encode(text)) is the text, and the bytes of its tokens add
    up to the text's. Models that normalise text, or put a space before it, are off by just that.
    """

    chat_template: str | None = None

    def __init__(self, path: str | Path):
        """Loads the model file; raises ValueError if there is none, or it is something else."""
        if not Path(path).is_file():
            raise ValueError(f"tokenizer {path}: no such sentencepiece model (train one with `jaxlm tokenizer`)")
        self._model = Path(path).read_bytes()
        try:
            self._sp = _load(self._model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path}: not a sentencepiece model ({error})") from error
        self.vocab_size = self._sp.vocab_size()
        self.bos_id, self.eos_id = _id_or_none(self._sp.bos_id()), _id_or_none(self._sp.eos_id())
        self.pad_id = max(self._sp.pad_id(), 0)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        self.special_tokens = {name: self._sp.id_to_piece(i) for name, i in names.items() if i is not None}
        probe = self._sp.encode(_PROBE)
        self.lossless = self._sp.decode(probe) == _PROBE and self.token_bytes()[probe].sum() == len(_PROBE)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32 [n]; no special tokens are added, and no control token is read out of the text."""
        return self._encode(self._sp, text)

    encode_plain = encode

    def encode_continuation(self, text: str) -> np.ndarray:
        """Ids of text that stands in the middle: a model that puts a space before every text does not do so here."""
        return self._encode(self._without_prefix, text)

    def _encode(self, sp: Any, text: str) -> np.ndarray:
        if not self.lossless or WORD_MARK not in text:
            return np.array(sp.encode(text), np.int32)
        # Inside pieces the word mark is a space; where it stands in the text itself, it has to be spelt in bytes.
        spelt = [sp.piece_to_id(f"<0x{b:02X}>") for b in WORD_MARK.encode()]
        ids = [i for part in text.split(WORD_MARK) for i in [*spelt, *sp.encode(part)]]
        return np.array(ids[len(spelt) :], np.int32)

    @functools.cached_property
    def _without_prefix(self) -> Any:
        if self.lossless:
            return self._sp
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        model.normalizer_spec.add_dummy_prefix = False
        return _load(model.SerializeToString())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; control tokens (begin, end, padding) vanish, and so do ids of a model's rows beyond the pieces."""
        return self._sp.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes per piece, the word mark counted as the space it stands for; 0 for control tokens, int32 [V]."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self._sp.is_byte(i):
                sizes[i] = 1
            elif not (self._sp.is_control(i) or self._sp.is_unknown(i) or self._sp.is_unused(i)):
                sizes[i] = len(self._sp.id_to_piece(i).replace(WORD_MARK, " ").encode())
        return sizes

    def fingerprint(self) -> str:
        """A hash of the model file."""
        return "sentencepiece:" + hashlib.sha256(self._model).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.model`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(self._model)


def _load(model: bytes) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _id_or_none(i: int) -> int | None:
    return i if i >= 0 else None
