"""Plans of which targets go into which row, made from lengths alone: a plan is data, never a running state.

stream  pretraining: all targets in a line, cut every T; each is predicted once; only the last row has padding
pack    whole examples, best-fit-decreasing into rows of T
pad     one example per row
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxlm.data.collate import Piece


class Plan(Protocol):
    """Random access to rows: each a list of pieces of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> list[Piece]: ...


class StreamPlan:
    """The targets of all documents, in the given order, cut into windows of `length`.

    lengths: targets per document, [n]; order: a permutation of the documents (None: as they are). A document that is
    cut goes on in the next row as a new segment, whose first input is the last token of the row before.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, length: int, order: np.ndarray | None = None):
        lengths = np.asarray(lengths, np.int64)
        self.order = np.arange(len(lengths)) if order is None else order
        self.length = length
        self._ends = np.cumsum(lengths[self.order])

    def __len__(self) -> int:
        return 0 if not len(self._ends) else -(-int(self._ends[-1]) // self.length)

    def __getitem__(self, row: int) -> list[Piece]:
        start = row * self.length
        stop = min(start + self.length, int(self._ends[-1]))
        pieces = []
        i = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[i - 1]) if i else 0
            end = min(stop, int(self._ends[i]))
            if end > start:
                pieces.append(Piece(int(self.order[i]), start - begin, end - begin))
            start, i = max(start, end), i + 1
        return pieces


class ListPlan:
    """Rows written out: what `pack` and `pad` return."""

    def __init__(self, rows: list[list[Piece]]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> list[Piece]:
        return self._rows[row]


def pack(lengths: Sequence[int] | np.ndarray, length: int) -> ListPlan:
    """Whole examples into as few rows of `length` as best-fit-decreasing finds; deterministic; O(n log length).

    lengths: targets per example, each at most `length` (ValueError otherwise). Longest first; each goes into the
    fullest row that still has room. Rows come in the order in which they were opened.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > length:
        raise ValueError(f"an example of {lengths.max()} targets does not fit a row of {length}")
    rows: list[list[Piece]] = []
    open_rows: dict[int, list[int]] = {}  # free room -> rows that have just that much
    rooms: list[int] = []  # the keys of open_rows, sorted
    for i in np.argsort(-lengths, kind="stable"):
        n = int(lengths[i])
        at = bisect.bisect_left(rooms, n)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(Piece(int(i), 0, n))
        left = room - n
        if left:
            if left not in open_rows:
                bisect.insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return ListPlan(rows)


def pad(lengths: Sequence[int] | np.ndarray) -> ListPlan:
    """One example per row, in order."""
    return ListPlan([[Piece(i, 0, int(n))] for i, n in enumerate(lengths)])


def padding_share(plan: Plan, lengths: Sequence[int] | np.ndarray, length: int) -> float:
    """The share of positions that hold nothing, between 0 and 1."""
    return 1.0 - float(np.sum(lengths)) / (len(plan) * length) if len(plan) else 0.0
