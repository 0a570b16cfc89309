"""The Python standard library's own sources: real text that every machine has, with no download."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from jaxlm.data.sources.files import File

# Tests and generated tables are long and repetitive; third-party packages are not the standard library.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings",
           "pydoc_data", "ensurepip"}  # fmt: skip


def files() -> list[File]:
    """Its .py files in a stable order, but for empty ones, tests, tables and third-party packages.

    Raises ValueError if this Python has none.
    """
    base = Path(sysconfig.get_paths()["stdlib"])
    found = [File(p, p.relative_to(base).as_posix()) for p in base.rglob("*.py")]
    found = [f for f in found if not SKIPPED & set(f.name.split("/")[:-1]) and f.path.stat().st_size]
    if not found:
        raise ValueError(f"no Python sources under {base}: this Python is installed without its library's source files")
    return sorted(found, key=lambda f: f.name)
