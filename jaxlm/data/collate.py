"""The one place where tokens become inputs, targets and masks; the shift by one happens here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.batch import Row, empty_row
from jaxlm.data.document import Document


class Piece(NamedTuple):
    """Targets `start` … `stop - 1` of a document; target t is token t + 1, predicted from token t."""

    document: int
    start: int
    stop: int


def num_targets(document: Document) -> int:
    """A document of n tokens has n - 1 targets: nothing predicts its first token."""
    return max(0, len(document.tokens) - 1)


def make_row(pieces: Sequence[tuple[Document, int, int]], length: int, *, pad_id: int = 0) -> Row:
    """Pieces (document, first target, end) side by side as segments 1, 2, …; what is left is padding.

    Each input is followed by its target within the same document, so nothing crosses from one document to the next.
    Positions restart at 0 in every segment. Raises ValueError if the pieces are longer than the row.

    >>> d = Document(np.array([7, 8, 9]), np.array([False, True, True]), np.array([0, 1, 1]), "f:0")
    >>> row = make_row([(d, 0, 2)], 4)
    >>> row["inputs"].tolist(), row["targets"].tolist(), row["mask"].astype(int).tolist()
    ([7, 8, 0, 0], [8, 9, 0, 0], [1, 1, 0, 0])
    """
    total = sum(stop - start for _, start, stop in pieces)
    if total > length:
        raise ValueError(f"{total} targets do not fit a row of {length}")
    row = empty_row(length, pad_id=pad_id)
    at = 0
    for segment, (document, start, stop) in enumerate(pieces, 1):
        here = slice(at, at + stop - start)
        row["inputs"][here] = document.tokens[start:stop]
        row["targets"][here] = document.tokens[start + 1 : stop + 1]
        row["mask"][here] = document.mask[start + 1 : stop + 1]
        row["target_bytes"][here] = document.target_bytes[start + 1 : stop + 1]
        row["positions"][here] = np.arange(stop - start)
        row["segments"][here] = segment
        at = here.stop
    return row
