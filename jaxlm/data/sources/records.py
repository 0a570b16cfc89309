"""Parquet, ArrayRecord and TFDS by index; each heavy reader is imported by the class that needs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.errors import BadRow


class Parquet:
    """Rows of Parquet files; one row group at a time is kept decoded."""

    def __init__(self, paths: Sequence[Path]):
        import pyarrow.parquet

        self.paths = list(paths)
        self._files = [pyarrow.parquet.ParquetFile(p) for p in self.paths]
        sizes = [(f, g, file.metadata.row_group(g).num_rows) for f, file in enumerate(self._files) for g in range(file.num_row_groups)]
        self._groups = [(f, g) for f, g, _ in sizes]
        self._ends = np.cumsum([n for _, _, n in sizes], dtype=np.int64)
        self._kept: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, i, side="right"))
        number, rows = self._kept
        if number != group:
            file, part = self._groups[group]
            rows = self._files[file].read_row_group(part).to_pylist()
            self._kept = (group, rows)
        return rows[i - (int(self._ends[group - 1]) if group else 0)]

    def origin(self, i: int) -> str:
        """file:row, rows from 0 within the file."""
        group = int(np.searchsorted(self._ends, i, side="right"))
        file = self._groups[group][0]
        first = next(g for g, (f, _) in enumerate(self._groups) if f == file)
        return f"{self.paths[file].as_posix()}:{i - (int(self._ends[first - 1]) if first else 0)}"


class ArrayRecords:
    """JSON objects or UTF-8 text in ArrayRecord files; text becomes {"text": …}."""

    def __init__(self, paths: Sequence[Path]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.paths = list(paths)
        self._source = ArrayRecordDataSource([str(p) for p in self.paths])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            text = self._source[i].decode()
        except UnicodeDecodeError as error:
            raise BadRow(self.origin(i), "broken UTF-8", f"{error.reason} at byte {error.start}") from error
        if not text.startswith("{"):
            return {"text": text}
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise BadRow(self.origin(i), "malformed JSON", f"{error.msg} at column {error.colno}") from error

    def origin(self, i: int) -> str:
        """files:row, rows from 0 over all files."""
        return f"{self.paths[0].as_posix()}:{i}" if len(self.paths) == 1 else f"{self.paths[0].parent.as_posix()}:{i}"


class Tfds:
    """A prepared TFDS data set stored as ArrayRecord, read without TensorFlow; byte strings become text."""

    def __init__(self, folder: str, split: str):
        import tensorflow_datasets as tfds

        self.folder, self.split = folder, split
        self._source = tfds.builder_from_directory(folder).as_data_source(split=split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._source[i]
        return {k: v.decode(errors="strict") if isinstance(v, bytes) else v for k, v in row.items()}

    def origin(self, i: int) -> str:
        """folder[split]:row, rows from 0."""
        return f"{self.folder}[{self.split}]:{i}"
