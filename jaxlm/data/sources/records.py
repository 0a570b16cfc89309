"""Parquet, ArrayRecord and TFDS by index; each heavy reader is imported by the class that needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.sources.files import File, locate, version
from jaxlm.data.sources.text import decode, parse_object


class Parquet:
    """Rows of Parquet files; one row group at a time is kept decoded."""

    def __init__(self, files: Sequence[File]):
        import pyarrow
        import pyarrow.parquet

        self.files = list(files)
        try:
            self._readers = [pyarrow.parquet.ParquetFile(f.path) for f in self.files]
        except pyarrow.ArrowInvalid as error:
            names = ", ".join(f.path.as_posix() for f in self.files)
            raise ValueError(f"not a whole Parquet file among {names}: {error}") from error
        self._groups = [(f, g) for f, reader in enumerate(self._readers) for g in range(reader.num_row_groups)]
        self._group_ends = _ends(self._readers[f].metadata.row_group(g).num_rows for f, g in self._groups)
        self._file_ends = _ends(reader.metadata.num_rows for reader in self._readers)
        self._kept: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return int(self._file_ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        group, row = locate(self._group_ends, i)
        kept, rows = self._kept
        if kept != group:
            file, part = self._groups[group]
            rows = self._readers[file].read_row_group(part).to_pylist()
            self._kept = (group, rows)
        return rows[row]

    def origin(self, i: int) -> str:
        """file:row, rows from 0 within the file."""
        file, row = locate(self._file_ends, i)
        return f"{self.files[file].path.as_posix()}:{row}"

    def key(self, i: int) -> str:
        """The file's name below the config's folder, and the row."""
        file, row = locate(self._file_ends, i)
        return f"{self.files[file].name}:{row}"

    def version(self) -> str:
        """Changes when a file does."""
        return version(f.path for f in self.files)


class ArrayRecords:
    """JSON objects or UTF-8 text in ArrayRecord files; text becomes {text_field: …}."""

    def __init__(self, files: Sequence[File], *, text_field: str = "text"):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.files, self.text_field = list(files), text_field
        self._readers = [ArrayRecordDataSource([str(f.path)]) for f in self.files]
        self._ends = _ends(len(reader) for reader in self._readers)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        file, row = locate(self._ends, i)
        text = decode(self._readers[file][row], self.origin(i))
        return parse_object(text, self.origin(i)) if text.startswith("{") else {self.text_field: text}

    def origin(self, i: int) -> str:
        """file:row, rows from 0 within the file."""
        file, row = locate(self._ends, i)
        return f"{self.files[file].path.as_posix()}:{row}"

    def key(self, i: int) -> str:
        """The file's name below the config's folder, and the row."""
        file, row = locate(self._ends, i)
        return f"{self.files[file].name}:{row}"

    def version(self) -> str:
        """Changes when a file does."""
        return version(f.path for f in self.files)


class Tfds:
    """A prepared TFDS data set stored as ArrayRecord, read without TensorFlow; byte strings become text."""

    def __init__(self, folder: str, split: str):
        import tensorflow_datasets as tfds

        self.folder, self.split = Path(folder), split
        if not (self.folder / "dataset_info.json").is_file():
            raise ValueError(f"{folder}: not a prepared TFDS data set (expected a folder with dataset_info.json)")
        builder = tfds.builder_from_directory(folder)
        try:
            self._source = builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise ValueError(f"{folder}: not random-access: prepare it with file_format='array_record'") from error
        except (KeyError, ValueError) as error:
            raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(builder.info.splits)}") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return _as_text(self._source[i], self.origin(i))

    def origin(self, i: int) -> str:
        """folder[split]:row, rows from 0."""
        return f"{self.folder.as_posix()}[{self.split}]:{i}"

    def key(self, i: int) -> str:
        """[split]:row, rows from 0."""
        return f"[{self.split}]:{i}"

    def version(self) -> str:
        """Changes when a file of the data set does."""
        return version(sorted(p for p in self.folder.iterdir() if p.is_file()))


def _as_text(value: Any, origin: str) -> Any:
    """Byte strings as text, arrays of them as lists, at any depth."""
    if isinstance(value, bytes):
        return decode(value, origin)
    if isinstance(value, Mapping):
        return {k: _as_text(v, origin) for k, v in value.items()}
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_as_text(v, origin) for v in value]
    return value


def _ends(sizes: Any) -> np.ndarray:
    return np.cumsum(list(sizes), dtype=np.int64)
