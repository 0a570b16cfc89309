"""A bucket for what must outlive the machine: the checkpoints, and beside them the small files of the run's folder.

    <bucket>/<run_dir>/checkpoints/…              written by every process, see `jaxlm.train.checkpoint`
    <bucket>/<run_dir>/run.json, metrics.jsonl, … copies of what process 0 keeps in run_dir, renewed at every save

A start on a machine whose disk is empty brings the small files back, so that curves and goodput go on. `gs://` only:
Orbax writes arrays to no other kind of bucket. Needs `pip install jaxlm[gcs]`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

SCHEME = "gs://"
CHECKPOINTS = "checkpoints"


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of a bucket.

    >>> in_bucket("gs://name/runs"), in_bucket("runs")
    (True, False)
    """
    return os.fspath(path).startswith(SCHEME)


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """A folder of this machine, made absolute, or of a bucket. ValueError where this installation cannot reach it."""
    if not in_bucket(path):
        _refuse_other_schemes(path)
        return epath.Path(path).absolute()
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{path}: a bucket needs gcsfs: pip install 'jaxlm[gcs]'") from error
    # What other processes have written since must be seen.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(path)  # `absolute` would put the working folder before it


def home(run_dir: str | os.PathLike[str], bucket: str | None) -> epath.Path:
    """What a run's checkpoints lie under: run_dir, or <bucket>/<run_dir>.

    >>> str(home("/data/runs/a", None))
    '/data/runs/a'
    """
    if bucket is None:
        return folder(run_dir)
    if not in_bucket(bucket):
        _refuse_other_schemes(bucket)
        raise ValueError(f"bucket: expected {SCHEME}name or {SCHEME}name/prefix, found {bucket!r}")
    return folder(f"{bucket.rstrip('/')}/{os.fspath(run_dir).strip('/')}")


def _refuse_other_schemes(path: str | os.PathLike[str]) -> None:
    if "://" in os.fspath(path):
        raise ValueError(
            f"{path}: of buckets, only {SCHEME} can be written to. Mount it as a folder that all processes share, on "
            "which files can be renamed, and give that folder's path"
        )


class Copies:
    """Copies of the files of a run's folder, checkpoints aside, in its folder in a bucket."""

    def __init__(self, run_dir: Path, there: epath.Path) -> None:
        self._here, self._there = run_dir, there
        self._copied: dict[Path, tuple[int, int]] = {}

    def update(self) -> None:
        """Copies what has changed since the last time."""
        for path in sorted(self._here.rglob("*")):
            name = path.relative_to(self._here)
            if CHECKPOINTS in name.parts or path.suffix == ".part" or not path.is_file():
                continue
            now = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._copied.get(name) != now:
                (self._there / name).write_bytes(path.read_bytes())
                self._copied[name] = now

    def bring_back(self) -> list[Path]:
        """Copies to this machine what is absent or shorter here; gives their names. The files only grow."""
        back = []
        for path in _files(self._there):
            name = Path(path.relative_to(self._there))
            here = self._here / name
            if not here.exists() or here.stat().st_size < path.stat().length:
                here.parent.mkdir(parents=True, exist_ok=True)
                here.write_bytes(path.read_bytes())
                back.append(name)
        return back


def _files(there: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(there.iterdir()) if there.exists() else []:
        if path.is_dir():
            yield from _files(path) if path.name != CHECKPOINTS else ()
        else:
            yield path


@contextlib.contextmanager
def on_this_machine(run_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """For a while, the small files of a run's folder in a bucket as a folder of this machine."""
    with tempfile.TemporaryDirectory() as here:
        Copies(Path(here), folder(run_dir)).bring_back()
        yield Path(here)
