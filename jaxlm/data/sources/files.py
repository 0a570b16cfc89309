"""Text files and JSON lines, plain or compressed, by index."""

from __future__ import annotations

import bz2
import functools
import glob
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.errors import BadRow

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst", ".bz2")


def find(path: str | tuple[str, ...] | None, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a config's path means: itself, every matching file below a folder, or a glob's, sorted.

    Below a folder, only files with one of the suffixes (compressed or not) count. ValueError if nothing is found.
    """
    if not path:
        raise ValueError(f"this kind of source needs a path: a file, a folder, or a glob of {', '.join(suffixes)} files")
    found: list[Path] = []
    for one in [path] if isinstance(path, str) else path:
        here = Path(one)
        if here.is_dir():
            found += [p for p in here.rglob("*") if p.is_file() and _stem(p).endswith(suffixes)]
        elif here.is_file():
            found.append(here)
        else:
            found += [Path(p) for p in glob.glob(one, recursive=True) if Path(p).is_file()]
    if not found:
        raise ValueError(f"no files at {path!r} (looked for {', '.join(suffixes)}, also {', '.join(COMPRESSED)})")
    return sorted(set(found))


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name


def read_bytes(path: Path) -> bytes:
    """The file's content, decompressed by its suffix."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".bz2":
        return bz2.decompress(data)
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path}: reading .zst needs the extra: pip install 'jaxlm[zstd]'") from error
        return zstandard.ZstdDecompressor().stream_reader(data).read()
    return data


class TextFiles:
    """One document per file, as {text_field: its text}."""

    def __init__(self, paths: Sequence[Path], *, text_field: str = "text", root: Path | None = None):
        self.paths, self.text_field = list(paths), text_field
        self._names = [p.relative_to(root).as_posix() if root else p.as_posix() for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            return {self.text_field: read_bytes(self.paths[i]).decode()}
        except UnicodeDecodeError as error:
            raise BadRow(self.origin(i), "broken UTF-8", f"{error.reason} at byte {error.start}") from error

    def origin(self, i: int) -> str:
        """The file's name (below the root, where there is one)."""
        return self._names[i]


class JsonLines:
    """One JSON object per line. Plain files are indexed once and read by offset; compressed ones are held in memory."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._lines = [_line_starts(p) for p in self.paths]
        self._ends = np.cumsum([len(starts) for starts in self._lines])
        self._read = functools.lru_cache(maxsize=8)(read_bytes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, i: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, i, side="right"))
        return file, i - (int(self._ends[file - 1]) if file else 0)

    def __getitem__(self, i: int) -> dict[str, Any]:
        file, row = self._locate(i)
        start, stop, _ = self._lines[file][row]
        path = self.paths[file]
        if path.suffix in COMPRESSED:
            line = self._read(path)[start:stop]
        else:
            with path.open("rb") as f:
                f.seek(start)
                line = f.read(stop - start)
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise BadRow(self.origin(i), "broken UTF-8", f"{error.reason} at byte {error.start} of the line") from error
        except json.JSONDecodeError as error:
            raise BadRow(self.origin(i), "malformed JSON", f"{error.msg} at column {error.colno}") from error
        if not isinstance(value, dict):
            raise BadRow(self.origin(i), "wrong type", f"expected a JSON object, found {type(value).__name__}")
        return value

    def origin(self, i: int) -> str:
        """file:line, lines from 1."""
        file, row = self._locate(i)
        return f"{self.paths[file].as_posix()}:{self._lines[file][row][2]}"


def _line_starts(path: Path) -> list[tuple[int, int, int]]:
    """(start, stop, line number from 1) of every line that is not blank."""
    data = read_bytes(path)
    found, start, number = [], 0, 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        number += 1
        if data[start:stop].strip():
            found.append((start, stop, number))
        start = stop + 1
    return found
