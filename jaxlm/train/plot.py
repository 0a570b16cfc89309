"""The loss curve of a run as a PNG, from its metrics file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.train.metrics import read_lines

# A palette that stays apart in the common kinds of colour blindness (Okabe and Ito, 2008).
_TRAIN, _EVALS, _BASELINES = "#0072B2", ("#D55E00", "#CC79A7", "#009E73"), "#595959"


def smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Gaussian average around each value, looking both ways so that a falling curve is not drawn late.

    out_i = sum_j w_ij v_j / sum_j w_ij with w_ij = exp(-(i - j)^2 / (2 span^2)), j over the finite values.

    values: [N]; span: standard deviation of the window in values, > 0; result [N].

    >>> smooth(np.array([2.0, np.nan, 4.0]), span=1.0).round(3).tolist()
    [2.238, 3.0, 3.762]
    """
    reach = int(np.ceil(4 * span))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / span) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel)[reach:-reach]
    weight = np.convolve(known.astype(float), kernel)[reach:-reach]
    return total / np.where(weight > 0, weight, np.nan)


def plot_run(
    metrics_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    metric: str = "bits_per_byte",
    baselines: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draws `metric` against steps: training, raw and smoothed, each evaluation set as points, baselines as lines.

    metrics_path: a `metrics.jsonl`; out: the PNG, 1600 by 1000 pixels; baselines: name -> value in the metric's unit
    (what zlib and lzma reach, for example). Raises ValueError if no line has the metric.
    """
    lines = read_lines(metrics_path)
    curves = {name: _curve(lines, name) for line in lines for name in line if name.endswith(f"/{metric}")}
    if not curves:
        raise ValueError(f"{metrics_path}: no line has the metric {metric!r}, neither in training nor in evaluation")
    # Its own canvas instead of pyplot: no global state, and nothing that looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_curves(axes, curves)
    _draw_baselines(axes, baselines or {})
    _dress(axes, metric, title)
    figure.savefig(out, dpi=200)
    return Path(out)


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; null, a number that was not finite, is NaN and leaves a gap."""
    points = [(line["step"], np.nan if line[name] is None else line[name]) for line in lines if name in line]
    steps, values = zip(*points)
    return np.array(steps), np.array(values, float)


def _draw_curves(axes: Any, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    evals = iter(_EVALS * len(curves))
    for name, (steps, values) in curves.items():
        group = name.split("/")[0]
        if group == "train":
            axes.plot(steps, values, color=_TRAIN, alpha=0.3, linewidth=0.8)
            smoothed = smooth(values, max(1.0, len(values) / 60))
            axes.plot(steps, smoothed, color=_TRAIN, linewidth=1.8, label=f"train (smoothed) {smoothed[-1]:.3f}")
        else:
            label = f"{group} {values[-1]:.3f}"
            style = dict(color=next(evals), markersize=4, linewidth=1.2, zorder=3, clip_on=False)
            axes.plot(steps, values, "o-", label=label, **style)


def _draw_baselines(axes: Any, baselines: Mapping[str, float]) -> None:
    for (name, value), style in zip(baselines.items(), ("--", ":", "-.") * len(baselines)):
        axes.axhline(value, color=_BASELINES, linewidth=1.1, linestyle=style, label=f"{name} {value:.3f}", zorder=1)


def _dress(axes: Any, metric: str, title: str | None) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(metric.replace("_", " ") + (" (nats)" if metric in ("loss", "entropy", "nll") else ""))
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
