"""Batches as a pure function of the step: `Loader.batch(step)`, this host's slice of the global batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.batch import Row, empty_row, stack_rows
from jaxlm.data.collate import Piece, make_row, num_targets
from jaxlm.data.corpus import TokenCorpus
from jaxlm.data.mixture import Mixture, Part
from jaxlm.data.packing import Plan


class Rows(NamedTuple):
    """A corpus with the plan of its rows.

    group: documents per example (2: chosen and rejected); the plan's unit is the example, and a row holds its documents
    next to each other, as segments group * j + 1, … of the row's example j. extra: named values of every document,
    [n], which a row holds as a field [slots] in the order of its segments; slots: the most that any row has.
    """

    corpus: TokenCorpus
    plan: Plan
    length: int
    pad_id: int = 0
    name: str = "data"
    group: int = 1
    extra: Mapping[str, np.ndarray] = MappingProxyType({})
    slots: int = 0

    def row(self, i: int) -> Row:
        """The arrays of row i."""
        pieces = self.pieces(i)
        row = make_row([(self.corpus[p.document], p.start, p.stop) for p in pieces], self.length, pad_id=self.pad_id)
        for name, values in self.extra.items():
            row[name] = np.zeros(self.slots, values.dtype)
            row[name][: len(pieces)] = values[[p.document for p in pieces]]
        return row

    def empty(self) -> Row:
        """A row of padding with the same fields."""
        extra = {name: np.zeros(self.slots, values.dtype) for name, values in self.extra.items()}
        return empty_row(self.length, pad_id=self.pad_id) | extra

    def pieces(self, i: int) -> list[Piece]:
        """The documents of row i, segment by segment; of a group's documents, always the whole."""
        if self.group == 1:
            return self.plan[i]
        documents = [p.document * self.group + g for p in self.plan[i] for g in range(self.group)]
        return [Piece(d, 0, num_targets(self.corpus[d])) for d in documents]

    def origins(self, i: int) -> list[str]:
        """Where the pieces of row i come from."""
        return [f"{self.corpus.origins[p.document]} targets {p.start}-{p.stop - 1}" for p in self.pieces(i)]

    def by_document(self, by_row: np.ndarray) -> np.ndarray:
        """Values of the segments of every row, [rows, slots], as one per document of the corpus, [n]."""
        values = np.zeros(len(self.corpus), by_row.dtype)
        for i in range(len(self.plan)):
            documents = [piece.document for piece in self.pieces(i)]
            values[documents] = by_row[i, : len(documents)]
        return values

    def most_targets(self) -> int:
        """The largest number of predicted tokens in a row (the mask's)."""
        predicted = self.corpus.num_predicted().reshape(-1, self.group).sum(axis=1)
        return max(sum(int(predicted[p.document]) for p in self.plan[i]) for i in range(len(self.plan)))

    def most_segments(self) -> int:
        """The largest number of segments in a row."""
        return self.group * max(len(self.plan[i]) for i in range(len(self.plan)))


class Loader:
    """Training batches of `batch_size` rows over all hosts, a pure function of (seed, step).

    parts: (rows, weight, epochs) of each data set; rows: `Rows`, or what has plan, name, row and origins. Host p of n
    takes the p-th n-th of every global batch, so that the hosts' slices in order are the batch that one host would see.
    Raises ValueError if the batch does not divide.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Any, float, int]],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} is not divisible by {process_count} hosts: use a multiple of {process_count}"
            )
        self.sources: list[Any] = [rows for rows, _, _ in parts]
        self.mixture = Mixture([Part(len(r.plan), w, e, r.name) for r, w, e in parts], seed=seed, shuffle=shuffle)
        self.batch_size = batch_size
        self._local = batch_size // process_count
        self._first = process_index * self._local

    def with_sources(self, sources: Sequence[Rows]) -> Loader:
        """The same order of rows, read from these (the same rows with other fields)."""
        loader = copy.copy(self)
        loader.sources = list(sources)
        return loader

    @property
    def num_steps(self) -> int:
        """Whole batches that the data gives."""
        return len(self.mixture) // self.batch_size

    def require(self, num_steps: int) -> None:
        """Raises ValueError unless the data fills `num_steps` batches."""
        if num_steps <= self.num_steps:
            return
        have = ", ".join(f"{p.name}: {p.num_rows:,} rows x {p.epochs} epochs" for p in self.mixture.parts)
        raise ValueError(
            f"{num_steps:,} steps of {self.batch_size} rows need {num_steps * self.batch_size:,} rows, but the data "
            f"gives {len(self.mixture):,} ({have}), enough for {self.num_steps:,} steps: lower train.num_steps or "
            "data.batch_size, or raise data.epochs"
        )

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This host's rows of the step's batch: the fields of `jaxlm.data.batch`, each [B/hosts, T]."""
        first = step * self.batch_size + self._first
        located = [self.mixture.locate(r) for r in range(first, first + self._local)]
        return stack_rows([self.sources[part].row(i) for part, i in located])

    def indices(self, step: int) -> list[dict[str, object]]:
        """What the whole batch of a step was made of: data set, row and origins, for reports on bad steps."""
        found = []
        for r in range(step * self.batch_size, (step + 1) * self.batch_size):
            part, i = self.mixture.locate(r)
            rows = self.sources[part]
            found.append({"data": rows.name, "row": i, "origins": rows.origins(i)})
        return found

    def batches(
        self, start: int, stop: int, *, num_threads: int = 2, buffer: int = 4
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, batch) from `start` up to `stop`, made ahead of time by Grain's worker threads.

        Starting anywhere costs nothing, and an error names the step. num_threads 0 makes each batch when it is asked.
        """
        if num_threads == 0:
            yield from ((step, self._checked(step)) for step in range(start, stop))
            return
        import grain

        steps = grain.MapDataset.range(start, stop).map(lambda step: (int(step), self._checked(int(step))))
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer))

    def _checked(self, step: int) -> dict[str, np.ndarray]:
        try:
            return self.batch(step)
        except Exception as error:
            raise RuntimeError(f"making the batch of step {step} failed: {error}") from error


def eval_batches(
    rows: Rows, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order; the last batch is filled up with empty rows. Hosts take slices as in training."""
    local = batch_size // process_count
    empty = rows.empty()
    for first in range(process_index * local, -(-len(rows.plan) // batch_size) * batch_size, batch_size):
        yield stack_rows([rows.row(i) if i < len(rows.plan) else empty for i in range(first, first + local)])
