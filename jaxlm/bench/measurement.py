"""Rival computations in turns, the table and the plot of what they took: for the benchmarks of one operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.figure

from jaxlm.bench.interleave import interleave, medians
from jaxlm.typing import Array

PEAK = "square products"


class Measurement(NamedTuple):
    """One line of the table."""

    direction: str
    candidate: str
    time_s: float
    speedup: float
    tflop_per_s: float
    peak_share: float
    temp_bytes: int
    temp_ratio: float
    max_error: float


def compare(
    direction: str, calls: Mapping[str, Callable[[], Any]], *, baseline: str, rounds: int, dtype: Any,
    flop: Mapping[str, float], temp_bytes: Mapping[str, int], error: Callable[[str, Any], float],
) -> list[Measurement]:  # fmt: skip
    """A line for each call, by medians of interleaved rounds.

    flop: that a call needs. The peak is the rate of square products of the dtype, which take their turn too. error:
    the name of a call and what it returns to its largest error.
    """
    peak, peak_flop = peak_product(dtype)
    times = medians(interleave({**calls, PEAK: peak}, rounds=rounds))
    top = peak_flop / times[PEAK]
    return [
        Measurement(
            direction=direction,
            candidate=name,
            time_s=times[name],
            speedup=times[baseline] / times[name],
            tflop_per_s=flop[name] / times[name] / 1e12,
            peak_share=flop[name] / times[name] / top,
            temp_bytes=temp_bytes[name],
            temp_ratio=temp_bytes[name] / max(temp_bytes[baseline], 1),
            max_error=error(name, call()),
        )
        for name, call in calls.items()
    ]


def peak_product(dtype: Any) -> tuple[Callable[[], Array], float]:
    """A chain of square products, and its FLOP: long enough that their start does not count."""
    side, count = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
    x = jax.random.normal(jax.random.key(0), (side, side), dtype) * side**-0.5

    @jax.jit
    def chain(x: Array) -> Array:
        return jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)

    return partial(chain, x), 2.0 * count * side**3


def table(lines: list[Measurement]) -> str:
    """The measurements as a person reads them."""
    names = ("ms", "speed-up", "TFLOP/s", "of peak", "temp MiB", "ratio", "max error")
    head = f"{'':17}{'candidate':22}" + "".join(f"{name:>{w}}" for name, w in zip(names, (9, 10, 9, 9, 10, 8, 11)))
    rows = [
        f"{m.direction:17}{m.candidate:22}{m.time_s * 1e3:9.1f}{m.speedup:10.2f}{m.tflop_per_s:9.3g}{m.peak_share:9.0%}"
        f"{m.temp_bytes / 2**20:10.1f}{m.temp_ratio:8.3f}{m.max_error:11.1e}"
        for m in lines
    ]
    return "\n".join([head, *rows])


def plot(lines: list[Measurement], path: Path, *, title: str) -> None:
    """Time and temporary memory of every candidate: a row of bars for each direction."""
    directions = list(dict.fromkeys(m.direction for m in lines))
    figure = matplotlib.figure.Figure(figsize=(11, 1 + 0.35 * len(lines)), layout="constrained")
    figure.suptitle(title)
    for row, direction in enumerate(directions):
        found = [m for m in lines if m.direction == direction]
        for column, (what, values) in enumerate(
            {"ms": [m.time_s * 1e3 for m in found], "temporary MiB": [m.temp_bytes / 2**20 for m in found]}.items()
        ):
            axes = figure.add_subplot(len(directions), 2, 2 * row + column + 1)
            bars = axes.barh([m.candidate for m in found], values, color="tab:blue" if column == 0 else "tab:gray")
            axes.bar_label(bars, [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in values], padding=3)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.set(title=direction, xlabel=what)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
