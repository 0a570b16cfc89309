"""What a run prints for a person to check: the table of parameters before step 0, and that of scores at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxlm.models.spec import Spec, count, flatten


def parameter_table(spec: Spec, shardings: Any = None, *, dtype: Any = jnp.float32) -> str:
    """Path, shape, dtype, sharding and bytes of every parameter, with the totals.

    `shardings` is the tree of `NamedSharding` (None: one device). Bytes are of the whole array and, in the last
    column, of the part that one device holds.

    >>> from jaxlm.models.spec import Param, zeros
    >>> print(parameter_table({"w": Param((4, 2), ("embed", None), zeros)}))
    parameter   shape  dtype    sharding  bytes  per device
    w           4 x 2  float32  -          32 B        32 B
    total           8                      32 B        32 B
    """
    placed: dict[str, NamedSharding] = {} if shardings is None else flatten(shardings)
    itemsize = jnp.dtype(dtype).itemsize
    rows = [("parameter", "shape", "dtype", "sharding", "bytes", "per device")]
    total = total_local = 0
    for path, param in flatten(spec).items():
        sharding = placed.get(path)
        size = math.prod(param.shape) * itemsize
        local = size if sharding is None else math.prod(sharding.shard_shape(param.shape)) * itemsize
        axes = "-" if sharding is None or not any(sharding.spec) else ", ".join(map(_axis, sharding.spec))
        sizes = bytes_text(size), bytes_text(local)
        rows.append((path, " x ".join(map(str, param.shape)), jnp.dtype(dtype).name, axes, *sizes))
        total, total_local = total + size, total_local + local
    rows.append(("total", f"{count(spec):,}", "", "", bytes_text(total), bytes_text(total_local)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i > 3 or (i == 1 and row[0] == "total") else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def score_table(rows: Mapping[str, Mapping[str, float]], *, digits: int = 2) -> str:
    """The scores of each system as Markdown; a cell is empty where a system has no such score.

    >>> print(score_table({"start": {"recall": 50.0}, "trained": {"recall": 61.5, "rank": 2}}, digits=1))
    | | recall | rank |
    |---|---|---|
    | start | 50.0 |  |
    | trained | 61.5 | 2.0 |
    """
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    lines = [f"| | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for row, scores in rows.items():
        cells = (f"{scores[name]:.{digits}f}" if name in scores else "" for name in names)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _axis(axis: Any) -> str:
    return "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis)


def bytes_text(n: int) -> str:
    """A size with its unit.

    >>> bytes_text(3 << 20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024  # type: ignore[assignment]
    raise AssertionError
