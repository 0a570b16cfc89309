"""Rows of CSV and TSV files as dicts of text."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.data.errors import BadRow
from jaxlm.data.sources.files import File, locate, read_bytes, version

Dialect = Literal["csv", "tsv"]


class Tables:
    """Rows by index; values are text as it stands in the file.

    dialect: csv (commas; a quoted field may hold commas, quotes and lines) or tsv (tabs; a quote is a character like
    any other). columns: names of the fields, where the first row does not hold them. The last used files are held.
    """

    def __init__(self, files: Sequence[File], *, dialect: Dialect, columns: Sequence[str] = ()):
        self.files, self._columns = list(files), tuple(columns)
        self._table = functools.lru_cache(maxsize=2)(functools.partial(_table, dialect=dialect))
        first = 0 if columns else 1
        self._ends = np.cumsum([max(len(self._table(f.path)) - first, 0) for f in self.files], dtype=np.int64)
        self._first = first
        for file in self.files if first else []:
            names = self._table(file.path)[0][1] if self._table(file.path) else []
            if len(set(names)) < len(names):
                raise ValueError(f"{file.path}: a column name stands twice in {', '.join(names)}: rename one")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        file, row = locate(self._ends, i)
        table = self._table(self.files[file].path)
        names = self._columns or table[0][1]
        values = table[row + self._first][1]
        if len(values) != len(names):
            expected = f"expected {len(names)} fields ({', '.join(names)}), found {len(values)}"
            raise BadRow(self.origin(i), "wrong number of fields", expected)
        return dict(zip(names, values))

    def origin(self, i: int) -> str:
        """file:line of the row's end, lines from 1."""
        file, row = locate(self._ends, i)
        return f"{self.files[file].path.as_posix()}:{self._table(self.files[file].path)[row + self._first][0]}"

    def key(self, i: int) -> str:
        """The file's name below the config's folder, and the row."""
        file, row = locate(self._ends, i)
        return f"{self.files[file].name}:{row}"

    def version(self) -> str:
        """Changes when a file does."""
        return version(f.path for f in self.files)


def _table(path: Path, *, dialect: Dialect) -> list[tuple[int, list[str]]]:
    """(line, fields) of every row that is not blank."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: expected UTF-8: {error.reason} (write the file again as UTF-8)") from error
    if dialect == "tsv":
        lines = enumerate(text.split("\n"), 1)
        return [(n, line.removesuffix("\r").split("\t")) for n, line in lines if line.strip(" \r")]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not a row of a CSV file: {error}") from error
