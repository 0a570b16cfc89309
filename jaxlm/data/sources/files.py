"""Which files a path means, and how their bytes are read and decompressed."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst", ".bz2")


class File(NamedTuple):
    """A file, and its name below the folder that the config names: the same on every machine."""

    path: Path
    name: str


def find(path: str | tuple[str, ...] | None, suffixes: tuple[str, ...]) -> list[File]:
    """The files that a config's path means: itself, every matching file below a folder, or a glob's, sorted.

    Below a folder, only files with one of the suffixes (compressed or not) count. ValueError for a path without files.
    """
    if not path:
        raise ValueError(f"this kind of source needs a path: a file, a folder, or a glob of {', '.join(suffixes)}")
    found: dict[Path, File] = {}
    for one in [path] if isinstance(path, str) else path:
        here = _find(Path(one).expanduser(), suffixes)
        if not here:
            raise ValueError(f"no files at {one!r} (looked for {', '.join(suffixes)}, also {', '.join(COMPRESSED)})")
        found |= {f.path: f for f in here}
    return sorted(found.values())


def _find(here: Path, suffixes: tuple[str, ...]) -> list[File]:
    if here.is_file():
        return [File(here, here.name)]
    if here.is_dir():
        root, paths = here, [p for p in here.rglob("*") if stem(p).endswith(suffixes)]
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), here.parts))
        paths = [] if root == here else list(root.glob(here.relative_to(root).as_posix()))
    return [File(p, p.relative_to(root).as_posix()) for p in paths if p.is_file()]


def stem(path: Path) -> str:
    """The file's name without the suffix of its compression."""
    return path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name


def read_bytes(path: Path) -> bytes:
    """The file's content, decompressed by its suffix; ValueError if the compressed data is broken or cut off."""
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".bz2":
            return bz2.decompress(data)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error}): fetch or write the file again") from error
    return _unzstd(path, data) if path.suffix == ".zst" else data


def _unzstd(path: Path, data: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path}: reading .zst needs the extra: pip install 'jaxlm[zstd]'") from error
    pieces = []
    try:
        while data:  # one frame after another: parallel compressors write many
            frame = zstandard.ZstdDecompressor().decompressobj()
            pieces.append(frame.decompress(data))
            if not frame.eof:
                raise ValueError("the last frame is cut off")
            data = frame.unused_data
    except (zstandard.ZstdError, ValueError) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error}): fetch or write the file again") from error
    return b"".join(pieces)


def version(paths: Iterable[Path]) -> str:
    """Changes when a file was written again: a hash of names, sizes and times of writing."""
    seen = [(p.as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Row i of parts that end at `ends` (running totals): (part, row within the part).

    >>> locate(np.array([2, 2, 5]), 2)
    (2, 0)
    """
    if not 0 <= i < (int(ends[-1]) if len(ends) else 0):
        raise IndexError(f"row {i} of {int(ends[-1]) if len(ends) else 0}")
    part = int(np.searchsorted(ends, i, side="right"))
    return part, i - (int(ends[part - 1]) if part else 0)
