"""Random-access sources of rows: a kind by name, opened from one typed record."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from jaxlm.data.sources import files, memory, records, stdlib


class Source(Protocol):
    """Rows by index, each a dict of fields, and the place that a message about a row names."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...

    def origin(self, i: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where rows come from and how they are read.

    kind: text (one document per file), stdlib (the Python standard library's own sources), jsonl (also .gz, .zst),
    parquet, arrayrecord, tfds (a prepared data set, read without TensorFlow), memory (`rows`). path: a file, a folder
    or a glob; for tfds the data set's folder. split: the TFDS split. text_field: the field of plain-text rows; rows
    with prompt/completion or messages need none. part: of the rows, "train" keeps those outside the held-out share,
    "heldout" those inside; a row's side is a stable hash of its name (file name or row number), so it never changes as
    data grows. heldout_share: in (0, 1). limit: at most that many rows. weight: share in a mixture of sources.
    """

    kind: Literal["text", "stdlib", "jsonl", "parquet", "arrayrecord", "tfds", "memory"]
    path: str | tuple[str, ...] | None = None
    split: str = "train"
    text_field: str = "text"
    part: Literal["all", "train", "heldout"] = "all"
    heldout_share: float = 0.1
    limit: int | None = None
    weight: float = 1.0
    name: str | None = None
    rows: tuple[Any, ...] = ()


OPENERS: dict[str, Callable[[SourceConfig], Source]] = {
    "text": lambda c: files.TextFiles(files.find(c.path, files.TEXT_SUFFIXES), text_field=c.text_field),
    "stdlib": lambda c: files.TextFiles(stdlib.paths(), text_field=c.text_field, root=stdlib.root()),
    "jsonl": lambda c: files.JsonLines(files.find(c.path, files.JSONL_SUFFIXES)),
    "parquet": lambda c: records.Parquet(files.find(c.path, (".parquet",))),
    "arrayrecord": lambda c: records.ArrayRecords(files.find(c.path, (".array_record", ".arrayrecord"))),
    "tfds": lambda c: records.Tfds(_single(c.path), c.split),
    "memory": lambda c: memory.InMemory(c.rows),
}


def open_source(cfg: SourceConfig) -> Source:
    """Opens the source and keeps the rows that `part` and `limit` name; ValueError if nothing is left."""
    source = OPENERS[cfg.kind](cfg)
    indices: Sequence[int] = range(len(source))
    if cfg.part != "all":
        if not 0 < cfg.heldout_share < 1:
            raise ValueError(f"heldout_share must be between 0 and 1, found {cfg.heldout_share}")
        indices = [i for i in indices if is_heldout(source.origin(i), cfg.heldout_share) == (cfg.part == "heldout")]
    indices = indices[: cfg.limit]
    if not len(indices):
        raise ValueError(f"source {describe(cfg)}: no rows (of {len(source)} before part={cfg.part!r} and limit={cfg.limit})")
    return source if len(indices) == len(source) else Subset(source, indices)


def is_heldout(name: str, share: float) -> bool:
    """A stable coin: the same name falls on the same side on every machine and in every run."""
    return zlib.crc32(name.encode()) < share * 2**32


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

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self.source[self.indices[i]]

    def origin(self, i: int) -> str:
        """The place of the row in its source."""
        return self.source.origin(self.indices[i])


def _single(path: str | tuple[str, ...] | None) -> str:
    if not isinstance(path, str):
        raise ValueError(f"tfds: path must be the folder of one prepared data set, found {path!r}")
    return path
