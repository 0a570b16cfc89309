"""Random-access sources of rows: a kind by name, opened from one typed record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from jaxlm.data.sources import files, memory, records, stdlib, tables, text


class Source(Protocol):
    """Rows by index, each a dict of fields.

    `origin(i)` is the place that a message about the row names; `key(i)` names the row alike on every machine, for the
    held-out split; `version()` changes when the rows may have, for caches.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...

    def origin(self, i: int) -> str: ...

    def key(self, i: int) -> str: ...

    def version(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where rows come from and how they are read.

    kind: text (one document per file), lines (one per line), stdlib (the Python standard library's own sources), jsonl,
    csv and tsv (a header, or `columns`), parquet, arrayrecord, tfds (a prepared data set, read without TensorFlow),
    memory (`rows`); the first of them also compressed (.gz, .bz2, .zst). path: a file, a folder or a glob, or several;
    for tfds the data set's folder. split: the TFDS split. A row is a conversation if it
    has messages_field, an example if it has prompt_field and completion_field, and plain text in text_field otherwise.
    chosen_field, rejected_field, label_field, reply_marker: of preferences, see `jaxlm.data.preference`. part: of the
    rows, "train" keeps those outside the held-out share, "heldout" those inside, and "test" a share of its own
    (test_share), which "train" then leaves out too; a row's side is a stable hash of its name (file below the folder,
    and row number), so it is the same on every machine and does not change as data grows. heldout_share: in (0, 1);
    with test_share, at least 0, below 1. limit: at most that many rows. weight: share in a mixture of sources. name: in
    messages and metrics.

    >>> SourceConfig("jsonl", path="data/*.jsonl.gz", prompt_field="question", completion_field="answer").part
    'all'
    """

    kind: Literal["text", "lines", "stdlib", "jsonl", "csv", "tsv", "parquet", "arrayrecord", "tfds", "memory"]
    path: str | tuple[str, ...] | None = None
    split: str = "train"
    columns: tuple[str, ...] = ()
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    label_field: str = "label"
    reply_marker: str = "\n\nAssistant:"
    part: Literal["all", "train", "heldout", "test"] = "all"
    heldout_share: float = 0.1
    test_share: float = 0.0
    limit: int | None = None
    weight: float = 1.0
    name: str | None = None
    rows: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in OPENERS:
            raise ValueError(f"source kind {self.kind!r}: expected one of {', '.join(OPENERS)}")
        if self.path and self.kind in ("stdlib", "memory"):
            raise ValueError(f"a source of kind {self.kind!r} takes no path, found {self.path!r}")
        if self.columns and self.kind not in ("csv", "tsv"):
            raise ValueError(f"columns name the fields of csv and tsv files, found kind {self.kind!r}")
        if self.rows and self.kind != "memory":
            raise ValueError(f"rows are for the kind 'memory', found kind {self.kind!r}")
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"heldout_share must be between 0 and 1, found {self.heldout_share}")
        if not 0 <= self.test_share < 1 - self.heldout_share:
            raise ValueError(
                f"test_share must be at least 0 and leave something to train on, found {self.test_share} beside "
                f"heldout_share={self.heldout_share}"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 (or None for all rows), found {self.limit}")


OPENERS: dict[str, Callable[[SourceConfig], Source]] = {
    "text": lambda c: text.TextFiles(files.find(c.path, files.TEXT_SUFFIXES), text_field=c.text_field),
    "lines": lambda c: text.Lines(files.find(c.path, files.TEXT_SUFFIXES), text_field=c.text_field),
    "stdlib": lambda c: text.TextFiles(stdlib.files(), text_field=c.text_field),
    "jsonl": lambda c: text.JsonLines(files.find(c.path, files.JSONL_SUFFIXES)),
    "csv": lambda c: tables.Tables(files.find(c.path, (".csv",)), dialect="csv", columns=c.columns),
    "tsv": lambda c: tables.Tables(files.find(c.path, (".tsv",)), dialect="tsv", columns=c.columns),
    "parquet": lambda c: records.Parquet(files.find(c.path, (".parquet",))),
    "arrayrecord": lambda c: records.ArrayRecords(
        files.find(c.path, (".array_record", ".arrayrecord")), text_field=c.text_field
    ),
    "tfds": lambda c: records.Tfds(_single(c.path), c.split),
    "memory": lambda c: memory.InMemory(c.rows),
}


def open_source(cfg: SourceConfig) -> Source:
    """Opens the source and keeps the rows that `part` and `limit` name; ValueError if nothing is left.

    >>> source = open_source(SourceConfig("memory", rows=({"text": "a"}, {"text": "b"})))
    >>> len(source), source[1], source.origin(1)
    (2, {'text': 'b'}, 'memory:1')
    """
    source = OPENERS[cfg.kind](cfg)
    indices: Sequence[int] = range(len(source))
    if cfg.part != "all":
        indices = [i for i in indices if part_of(source.key(i), cfg.heldout_share, cfg.test_share) == cfg.part]
    indices = indices[: cfg.limit]
    if not len(indices):
        raise ValueError(f"source {describe(cfg)}: part={cfg.part!r} leaves none of its {len(source)} rows")
    return source if len(indices) == len(source) else Subset(source, indices)


def part_of(name: str, heldout_share: float, test_share: float = 0.0) -> str:
    """A stable die: the same name falls into the same part on every machine and in every run."""
    value = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    if value < heldout_share * 2**64:
        return "heldout"
    return "test" if value < (heldout_share + test_share) * 2**64 else "train"


def describe(cfg: SourceConfig) -> str:
    """The source's name in messages and metrics."""
    return cfg.name or (cfg.kind if cfg.path is None else f"{cfg.kind}:{cfg.path}")


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some rows of a source, in the order given."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[self.indices[i]]

    def origin(self, i: int) -> str:
        """The place of the row in its source."""
        return self.source.origin(self.indices[i])

    def key(self, i: int) -> str:
        """The row's name in its source."""
        return self.source.key(self.indices[i])

    def version(self) -> str:
        """The source's."""
        return self.source.version()


def _single(path: str | tuple[str, ...] | None) -> str:
    if not isinstance(path, str):
        raise ValueError(f"tfds: path must be the folder of one prepared data set, found {path!r}")
    return path
