"""Rows of sentences for training an encoder: each column a text of its own, a batch a pure function of the step.

A batch has, for every column, `<column>/tokens` and `<column>/segments` (1 for a token, 0 for padding), both int32
[B, T] with a T of the column's own, and further values of the rows by name (`score`).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.data.batch import Row
from jaxlm.data.encode import text_of
from jaxlm.data.errors import BadRow
from jaxlm.data.loader import Loader
from jaxlm.data.sources import SourceConfig, describe, open_source
from jaxlm.data.tokenizer_bpe import train_bpe
from jaxlm.data.tokenizer_hf import HFTokenizer

LENGTH_STEP = 8
"""Lengths are rounded up to a multiple of this: a program is compiled for each, and padding is computed."""

TEXT = "text"
"""The column of data.examples="sentences"."""


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """What an encoder is trained on.

    train: sources, their rows one after another. fields: of a row, the texts. examples: sentences (each text is a row
    of its own, a repeated one only once, in the column `text`) or tuples (the texts of a row belong together: an
    anchor, its positive, hard negatives; the columns are the fields). score_field: a number beside them. tokenizer:
    a folder with tokenizer.json, or "bpe:8000" to train one of that size on the texts; None for that of init_from.
    max_tokens: longer texts are cut there. batch_size: rows per step over all devices and hosts. epochs, bad_rows,
    num_threads: as in `DataConfig`.
    """

    train: tuple[SourceConfig, ...]
    tokenizer: str | None = None
    fields: tuple[str, ...] = (TEXT,)
    examples: Literal["sentences", "tuples"] = "sentences"
    score_field: str | None = None
    max_tokens: int = 32
    batch_size: int = 64
    seed: int = 0
    epochs: int = 1
    bad_rows: Literal["refuse", "skip"] = "refuse"
    num_threads: int = 2

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError("data.fields names no text of a row: expected at least one")
        if self.examples == "sentences" and self.score_field is not None:
            raise ValueError(f"data.score_field={self.score_field!r} is of tuples: set data.examples='tuples'")
        weighted = [describe(source) for source in self.train if source.weight != 1]
        if weighted:
            raise ValueError(f"data.train: sources are read one after another, without weights; found {weighted}")
        if self.max_tokens < 3:
            raise ValueError(f"data.max_tokens={self.max_tokens}: expected at least 3, two of them special")

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is trained on."""
        return self.max_tokens


class Example(NamedTuple):
    """The texts of a row of training, what else it has, and where it comes from."""

    texts: tuple[str, ...]
    values: Mapping[str, Any]
    origin: str


def read_examples(
    cfg: SentenceConfig, skipped: collections.Counter[str], *, exclude: Collection[str] = ()
) -> list[Example]:
    """The rows of all sources in order; `skipped` counts what was left out, by reason.

    exclude: sentences that must not be trained on, such as those of an evaluation; only of examples="sentences".
    Raises BadRow at a row that cannot be used, unless cfg.bad_rows is "skip".
    """
    examples = _rows(cfg, skipped)
    if cfg.examples == "sentences":
        examples = _once(examples, set(exclude), skipped)
    found = list(examples)
    if not found:
        raise ValueError(f"data.train: no row is left to train on; left out: {dict(skipped) or 'nothing'}")
    return found


def _rows(cfg: SentenceConfig, skipped: collections.Counter[str]) -> Iterator[Example]:
    for source in cfg.train:
        opened = open_source(source)
        for i in range(len(opened)):
            try:
                yield _example(cfg, opened[i], opened.origin(i))
            except BadRow as error:
                if cfg.bad_rows == "refuse":
                    raise
                skipped[error.reason] += 1


def _example(cfg: SentenceConfig, row: Mapping[str, Any], origin: str) -> Example:
    texts = tuple(text_of(row, origin, field=field).strip() for field in cfg.fields)
    if cfg.score_field is None:
        return Example(texts, {}, origin)
    try:
        score = float(row[cfg.score_field])
    except (KeyError, TypeError, ValueError) as error:
        found = repr(row.get(cfg.score_field, "nothing"))
        raise BadRow(origin, "no score", f"expected a number in {cfg.score_field!r}, found {found}") from error
    if not math.isfinite(score):
        raise BadRow(origin, "no score", f"expected a finite number in {cfg.score_field!r}, found {score}")
    return Example(texts, {"score": np.float32(score)}, origin)


def _once(examples: Iterable[Example], exclude: set[str], skipped: collections.Counter[str]) -> Iterator[Example]:
    """Every text by itself, the first time it comes."""
    seen: set[str] = set()
    for example in examples:
        for text in example.texts:
            reason = "of an evaluation" if text in exclude else "repeated" if text in seen else None
            if reason is not None:
                skipped[reason] += 1
                continue
            seen.add(text)
            yield Example((text,), {}, example.origin)


class Column(NamedTuple):
    """The ids of every row's text, and the length to which they are padded."""

    tokens: Sequence[np.ndarray]
    length: int


@dataclasses.dataclass(frozen=True)
class SentenceRows:
    """Tokenised rows as `Loader` reads them. extra: further values, an array each with a first axis of rows."""

    columns: Mapping[str, Column]
    origin: Sequence[str]
    pad_id: int = 0
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    name: str = "data"

    @property
    def plan(self) -> range:
        """One example is one row."""
        return range(len(self.origin))

    def row(self, i: int) -> Row:
        """The arrays of row i, those of tokens [T]."""
        row: Row = {}
        for name, column in self.columns.items():
            ids = column.tokens[i]
            row[f"{name}/tokens"] = np.pad(ids, (0, column.length - len(ids)), constant_values=self.pad_id)
            row[f"{name}/segments"] = (np.arange(column.length) < len(ids)).astype(np.int32)
        return row | {name: values[i] for name, values in self.extra.items()}

    def empty(self) -> Row:
        """A row of padding with the same fields."""
        return {name: np.zeros_like(x) for name, x in self.row(0).items()}

    def origins(self, i: int) -> list[str]:
        """Where row i comes from."""
        return [self.origin[i]]

    def fingerprint(self) -> str:
        """A hash of all that training reads."""
        digest = hashlib.sha256()
        for column in self.columns.values():
            digest.update(np.array([len(t) for t in column.tokens], np.int64).tobytes())
            digest.update(b"".join(t.tobytes() for t in column.tokens))
        for values in self.extra.values():
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:16]


def make_column(tokenizer: HFTokenizer, texts: Sequence[str], *, max_tokens: int) -> Column:
    """The texts between the tokenizer's special tokens, padded to the longest of them."""
    tokens = tokenizer.encode_sentences(texts, max_tokens=max_tokens)
    longest = max(len(t) for t in tokens)
    return Column(tokens, -(-longest // LENGTH_STEP) * LENGTH_STEP)


def make_rows(cfg: SentenceConfig, examples: Sequence[Example], tokenizer: HFTokenizer) -> SentenceRows:
    """The examples as rows: columns named by the fields (`text` for sentences), and their values."""
    names = (TEXT,) if cfg.examples == "sentences" else cfg.fields
    columns = {
        name: make_column(tokenizer, [e.texts[i] for e in examples], max_tokens=cfg.max_tokens)
        for i, name in enumerate(names)
    }
    extra = {name: np.array([e.values[name] for e in examples]) for name in examples[0].values}
    name = ", ".join(describe(source) for source in cfg.train)
    return SentenceRows(columns, [e.origin for e in examples], tokenizer.pad_id, extra, name)


@dataclasses.dataclass(frozen=True)
class Sentences:
    """What a recipe trains on: batches, what was left out by reason, and a hash of the data."""

    train: Loader
    skipped: collections.Counter[str]
    fingerprint: str


def make_sentences(
    cfg: SentenceConfig, rows: SentenceRows, skipped: collections.Counter[str], *, process_index: int = 0,
    process_count: int = 1,
) -> Sentences:  # fmt: skip
    """The rows in shuffled batches."""
    loader = Loader(
        [(rows, 1.0, cfg.epochs)], batch_size=cfg.batch_size, seed=cfg.seed, process_index=process_index,
        process_count=process_count,
    )  # fmt: skip
    return Sentences(loader, skipped, rows.fingerprint())


def sentence_tokenizer(where: str, texts: Iterable[str]) -> HFTokenizer:
    """The tokenizer of a folder, or for "bpe:SIZE" one of that size trained on the texts."""
    if not where.startswith("bpe:"):
        return HFTokenizer(where)
    size = where.removeprefix("bpe:")
    if not size.isdigit():
        raise ValueError(f"data.tokenizer={where!r}: expected 'bpe:SIZE', for instance bpe:8000")
    return train_bpe(texts, vocab_size=int(size))
