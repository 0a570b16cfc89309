"""Cycles of a program for a TPU that is not here, by its compiler.

What XLA makes has an estimate of the compiler's cost model beside each operation, which counts as often as the loops
around it run. What Mosaic makes of a Pallas kernel has none, but libtpu writes down its schedule, over which the grid
is a loop. Neither knows of waiting for the other units: both are for comparing programs, and no time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxlm.train.collectives import computations, run_counts

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1
_ADDRESS = re.compile(r"^\s*(0x[0-9a-f]+|0) ([A-Z]{2})?", re.MULTILINE)


def of_program(hlo: str) -> int | None:
    """Of the operations that XLA made, by its optimized HLO; None if there is one that it has no estimate of."""
    if f'"estimated_cycles":"{_UNKNOWN}"' in hlo:
        return None
    bodies = computations(hlo)
    times = run_counts(bodies)
    return sum(
        times[name] * int(cycles) for name, lines in bodies.items() for cycles in _ESTIMATE.findall("\n".join(lines))
    )


@contextlib.contextmanager
def schedules() -> Iterator[Path]:
    """A folder into which libtpu writes what it schedules; to be entered before libtpu is loaded in this process."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{before} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true".strip()
        try:
            yield Path(folder)
        finally:
            os.environ["LIBTPU_INIT_ARGS"] = before


def of_kernel(folder: Path, name: str, *, steps: int, ragged: bool) -> int | None:
    """Of a kernel that was compiled last, over all steps of its grid; None if its schedule is not in the folder.

    ragged: the last of its blocks has a body of its own, as long as that of the others, which hardly ever runs.
    """
    found = [p for p in folder.glob(f"*-{name}*-final_bundles.txt") if "schedule-analysis" not in p.name]
    if not found:
        return None
    bundles = [(int(at, 16), mark) for at, mark in _ADDRESS.findall(max(found).read_text())]
    joins = [at for at, mark in bundles if mark == "PF"]  # where the two ways of a branch meet again
    bodies = sorted(b - a for a, b in itertools.pairwise(joins))
    rarely = bodies[-2] if ragged and len(bodies) > 1 else 0
    return steps * (bundles[-1][0] + 1 - rarely)
