"""Text files of one document each, lines of text, and JSON lines; plain or compressed."""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.errors import BadRow
from jaxlm.data.sources.files import COMPRESSED, File, locate, read_bytes, version


class TextFiles:
    """One document per file, as {text_field: its text}."""

    def __init__(self, files: Sequence[File], *, text_field: str = "text"):
        self.files, self.text_field = list(files), text_field

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {self.text_field: decode(read_bytes(self.files[i].path), self.origin(i))}

    def origin(self, i: int) -> str:
        """The file's path."""
        return self.files[i].path.as_posix()

    def key(self, i: int) -> str:
        """The file's name below the config's folder."""
        return self.files[i].name

    def version(self) -> str:
        """Changes when a file does."""
        return version(f.path for f in self.files)


class Lines:
    """One text per line, as {text_field: the line}, blank lines left out.

    A file's lines are indexed once. Plain files are mapped and read by offset; of the compressed ones, the last used
    are held decompressed, so read these in order.
    """

    def __init__(self, files: Sequence[File], *, text_field: str = "text"):
        self.files, self.text_field = list(files), text_field
        self._content = functools.lru_cache(maxsize=2)(_content)
        self._lines = [_index(self._content(f.path)) for f in self.files]
        self._ends = np.cumsum([len(lines) for lines in self._lines], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {self.text_field: self._line(i)}

    def _line(self, i: int) -> str:
        file, row = locate(self._ends, i)
        start, stop, _ = self._lines[file][row]
        return decode(self._content(self.files[file].path)[start:stop], self.origin(i)).removesuffix("\r")

    def origin(self, i: int) -> str:
        """file:line, lines from 1."""
        file, row = locate(self._ends, i)
        return f"{self.files[file].path.as_posix()}:{self._lines[file][row, 2]}"

    def key(self, i: int) -> str:
        """The file's name below the config's folder, and the line."""
        file, row = locate(self._ends, i)
        return f"{self.files[file].name}:{self._lines[file][row, 2]}"

    def version(self) -> str:
        """Changes when a file does."""
        return version(f.path for f in self.files)


class JsonLines(Lines):
    """One JSON object per line, blank lines left out."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return parse_object(self._line(i), self.origin(i))


def _content(path: Path) -> bytes | mmap.mmap:
    if path.suffix in COMPRESSED or not path.stat().st_size:
        return read_bytes(path)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _index(content: bytes | mmap.mmap) -> np.ndarray:
    """Start, stop and number (from 1) of every line that is not blank, int64 [n, 3]."""
    found, start, number = [], 0, 0
    while start < len(content):
        stop = content.find(b"\n", start)
        stop = len(content) if stop < 0 else stop
        number += 1
        if content[start:stop].strip():
            found.append((start, stop, number))
        start = stop + 1
    return np.array(found, np.int64).reshape(-1, 3)


def decode(data: bytes, origin: str) -> str:
    """UTF-8 as text; BadRow where it is broken."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRow(origin, "broken UTF-8", f"{error.reason} at byte {error.start}") from error


def parse_object(text: str, origin: str) -> dict[str, Any]:
    """One JSON object; BadRow for anything else."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        column = isinstance(error, json.JSONDecodeError) and error.colno
        where = f"{error.msg} at column {column}" if column else "nested too deeply"
        raise BadRow(origin, "malformed JSON", f"{where}; expected one JSON object per line") from error
    if not isinstance(value, dict):
        raise BadRow(origin, "wrong type", f"expected a JSON object, found {type(value).__name__}")
    return value
