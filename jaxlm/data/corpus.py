"""Many documents as a few flat arrays, in memory or memory-mapped from a cache that several processes may share."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxlm.data.document import Document

_ARRAYS = ("tokens", "mask", "target_bytes", "ends", "labels")


class TokenCorpus:
    """Documents by index. Arrays are flat; document i is [ends[i-1], ends[i]), and labels[i] its label."""

    def __init__(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        target_bytes: np.ndarray,
        ends: np.ndarray,
        labels: np.ndarray,
        origins: Sequence[str],
    ):
        self.tokens, self.mask, self.target_bytes, self.ends = tokens, mask, target_bytes, ends
        self.labels, self.origins = labels, origins

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> TokenCorpus:
        """Copies the documents into flat arrays."""
        items = list(documents)
        ends = np.cumsum([len(d.tokens) for d in items], dtype=np.int64)
        return cls(
            _join([d.tokens for d in items], np.int32),
            _join([d.mask for d in items], np.bool_),
            _join([d.target_bytes for d in items], np.int32),
            ends,
            np.array([d.label for d in items], np.bool_),
            [d.origin for d in items],
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> Document:
        here = slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        arrays = (self.tokens[here], self.mask[here], self.target_bytes[here])
        return Document(*arrays, self.origins[i], bool(self.labels[i]))

    def num_targets(self) -> np.ndarray:
        """Targets per document, int64 [n]: its tokens but the first."""
        return np.maximum(np.diff(self.ends, prepend=0) - 1, 0)

    def num_predicted(self) -> np.ndarray:
        """Targets per document that count, int64 [n]: those whose mask is True."""
        ends = np.concatenate([[0], np.cumsum(self.mask)])
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        return ends[self.ends] - ends[np.minimum(starts + 1, self.ends)]

    def fingerprint(self) -> str:
        """A hash of every token, mask, boundary and label: two runs with the same one saw the same data."""
        digest = hashlib.sha256()
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes the folder in one rename, so that no reader sees half of it; whoever comes second changes nothing."""
        temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
        temporary.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(self, name))
        (temporary / "origins.json").write_text(json.dumps(list(self.origins)))
        try:
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary)
            if not folder.is_dir():
                raise

    @classmethod
    def load(cls, folder: Path) -> TokenCorpus:
        """Maps the arrays of a saved corpus; nothing is read until it is used."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return cls(**arrays, origins=json.loads((folder / "origins.json").read_text()))


def _join(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros((0,), dtype)
