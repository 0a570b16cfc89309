"""The Python standard library's own sources: real text that every machine has, with no download."""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Tests and generated tables are long and repetitive; third-party packages are not the standard library.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings",
           "pydoc_data", "ensurepip"}  # fmt: skip


def root() -> Path:
    """Where the standard library lies."""
    return Path(sysconfig.get_paths()["stdlib"])


def paths() -> list[Path]:
    """Its .py files in a stable order, but for empty ones, tests, tables and third-party packages.

    Raises ValueError if this Python has none.
    """
    base = root()
    found = [p for p in base.rglob("*.py") if not SKIPPED & set(p.relative_to(base).parts[:-1]) and p.stat().st_size]
    if not found:
        raise ValueError(f"no Python sources under {base}: this Python is installed without its library's source files")
    return sorted(found, key=lambda p: p.relative_to(base).as_posix())
