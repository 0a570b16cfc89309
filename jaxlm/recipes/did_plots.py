"""One picture per experiment of the DID recipe, drawn from the series that its result holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.recipes.did_checks import Result
from jaxlm.recipes.did_fit import LABELS

# Colours that stay apart in the common kinds of colour blindness (Okabe and Ito, 2008).
BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#595959",
)  # fmt: skip
FLOOR = 1e-17
"""JSDs are drawn from here: float64 cannot tell smaller ones from 0."""


def plot(result: Result, out: str | os.PathLike[str]) -> Path:
    """Draws an experiment's result as a PNG, 1800 by 1000 pixels."""
    # Its own canvas instead of pyplot: no global state, and nothing that looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result.name.upper()}  {result.title}", x=0.01, ha="left", fontsize=12)
    DRAW[result.name](figure, result.series)
    figure.savefig(out, dpi=200)
    return Path(out)


_PLATE = dict(frameon=True, framealpha=0.9, edgecolor="none")
"""A legend that stays readable on top of lines."""


def dress(axes: Any, xlabel: str, ylabel: str, *, legend: bool = True) -> None:
    """Labels, a light grid, no box, and a legend that stays readable on top of lines."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=9, **_PLATE)


def _e1(figure: Any, series: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.6))
    names = list(LABELS)
    for beta, color, shift in (("1", BLUE, -0.19), ("0.1", ORANGE, 0.19)):
        seeds = np.maximum([series[f"{name} {beta}"] for name in names], FLOOR)
        place = np.arange(len(names)) + shift
        places = np.repeat(place[:, None], seeds.shape[1], 1)
        left.plot(seeds, places, ".", color=color, markersize=4)
        right.barh(place, seeds.mean(axis=1), 0.36, color=color, label=f"beta = {beta}, mean over seeds")
        right.plot(seeds, places, ".", color="black", markersize=3)
    left.axvline(1e-9, color=RED, linewidth=1, linestyle=":", label="bound for DPO: 1e-9")
    right.axvline(0.03, color=RED, linewidth=1, linestyle=":", label="bound for the others: 0.03")
    right.axvline(series["start"], color=GREY, linewidth=1, linestyle="--", label="start: the reference")
    left.set_xscale("log")
    left.set_xlim(FLOOR / 2, 2)
    right.set_xlim(0, 0.4)  # room for the legend
    left.set_yticks(range(len(names)), [LABELS[name] for name in names])
    left.invert_yaxis()
    dress(left, "JSD(target, fit), nats, single seeds", "", legend=False)
    dress(right, "JSD(target, fit), nats (dots: single seeds)", "", legend=False)
    left.legend(frameon=False, fontsize=9, loc="lower left")
    right.legend(fontsize=9, loc="upper right", **_PLATE)


def _e2(figure: Any, series: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    axes.plot(
        series["grid"], series["curve"], color=BLUE, linewidth=1.5, label="rejected ∝ ref · exp(-g r), closed form"
    )
    axes.plot(series["g"], series["measured"], "o", color=BLUE, markersize=6, label="DPO's fit")
    axes.axvline(series["beta"], color=GREEN, linewidth=1, linestyle="--", label="g = beta: the optimal rejected")
    for name, color in zip(series["others"], (RED, PINK, ORANGE, SKY)):
        value = series["others"][name]
        axes.axhline(value, color=color, linewidth=1.2, label=f"rejected: {name} ({value:.3f})")
    axes.axhline(series["measured"][0], color=GREY, linewidth=1, linestyle=":", label="no training")
    axes.set_ylim(-0.02, 0.75)
    dress(axes, "g", "JSD(target, fit), nats, mean over seeds", legend=False)
    axes.legend(fontsize=9, ncols=2, loc="upper left", **_PLATE)


def _e3(figure: Any, series: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = series["rows"]
    place = np.arange(len(rows))
    values = np.array([row[2:] for row in rows])
    for column, (name, color) in enumerate((("chosen", BLUE), ("rejected", ORANGE))):
        axes.bar(place + 0.38 * (column - 0.5), values[:, column], 0.36, color=color, label=f"{name}, DPO's fit")
    for column in (2, 3):
        label = "predicted" if column == 2 else None
        axes.plot(place + 0.38 * (column - 2.5), values[:, column], "_", color="black", markersize=22, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(place, [f"beta {beta:g}\nseed {seed}" for beta, seed, *_ in rows])
    dress(axes, "", "expected change of log-probability, nats")


def _e4(figure: Any, series: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = np.array(series["rows"])
    axes.plot(series["grid"], series["curve"], color=BLUE, linewidth=1.5, label="chosen, predicted: Phi'(beta)")
    axes.plot(rows[:, 0], rows[:, 1], "o", color=BLUE, label="chosen, DPO's fit")
    axes.plot(rows[:, 0], rows[:, 2], "s-", color=ORANGE, label="rejected, DPO's fit: -KL(ref || target)")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(series["crossover"], color=GREEN, linestyle="--", linewidth=1, label=f"s0 = {series['crossover']:.3f}")
    dress(axes, "beta", "expected change of log-probability, nats")


def _e5(figure: Any, series: Mapping[str, Any]) -> None:
    for i, (name, color) in enumerate((("power law", BLUE), ("independent", ORANGE))):
        axes = figure.add_subplot(1, 2, i + 1)
        x, y = (np.array(values) for values in series["points"][name])
        share = float(np.mean(series["shares"][name]))
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.plot(x, y, ".", color=color, markersize=4)
        axes.set_title(f"rejected policy: {name}; {share:.0%} of the pairs ordered", loc="left", fontsize=10)
        if name == "power law":
            ends = np.array([x.min(), x.max()])
            beta = series["beta"]
            axes.plot(ends, beta * ends, color="black", linewidth=0.8, label=f"slope beta = {beta:g}")
        dress(axes, "M(target) - M(ref), nats", "M(ref) - M(rejected), nats", legend=name == "power law")


def _e6(figure: Any, series: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    colors = dict(zip(series["entropies"], (BLUE, SKY, ORANGE, RED)))
    for name, (h_ref, q_sharp, sharp, q_smooth, smooth) in series["entropies"].items():
        style = dict(color=colors[name], linewidth=1, markersize=7)
        left.plot([q_sharp, q_smooth], [sharp - h_ref, smooth - h_ref], "-", **style)
        left.plot(q_sharp, sharp - h_ref, "v", **style, label=name)
        left.plot(q_smooth, smooth - h_ref, "^", **style)
    left.axhline(0, color=GREY, linewidth=0.8)
    left.axvline(series["log_num"], color=GREY, linewidth=0.8, linestyle=":")
    left.set_title("v sharpen, ^ smooth; the claim: lines rise to the right", loc="left", fontsize=9)
    dress(left, "entropy of the DID, nats (dotted: its maximum)", "H(policy) - H(reference), nats")
    for (name, found), color in zip(series["draws"].items(), (ORANGE, RED)):
        spread = np.std(found["difference"])
        scaled = np.array(found["difference"]) / spread
        right.plot(found["skewness"], scaled, ".", color=color, label=f"{name} (one dot: a draw)")
    right.axhline(0, color=GREY, linewidth=0.8)
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set_title("below 0: the claim holds", loc="left", fontsize=9)
    dress(right, "skewness of log ref over the responses", "H(DID, sharpen) - H(DID, smooth), standard deviations")


def _e7(figure: Any, series: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    rows = np.array(series["rows"])
    for num_samples, color, shift in ((32, ORANGE, 0.97), (1024, BLUE, 1.03)):
        length, _, exact, mean, deviation, ess, covered = rows[rows[:, 1] == num_samples].T
        error = 100 * (mean - exact) / exact
        style = dict(color=color, capsize=3, linewidth=1.2, markersize=4)
        left.errorbar(length * shift, error, 100 * deviation / exact, fmt="o-", label=f"K = {num_samples}", **style)
        right.plot(length, ess, "o-", color=color, label=f"K = {num_samples}")
        for x, y, share in zip(length, ess, covered):
            right.annotate(f"{share:.0%}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8, color=color)
    left.axhline(0, color=GREY, linewidth=0.8)
    right.axhline(10, color=RED, linewidth=1, linestyle="--", label="floor: refused below")
    right.set_yscale("log")
    right.set_title("percentages: 95 % intervals that hold the exact value", loc="left", fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(rows[:, 0])), [f"{t:g}" for t in sorted(set(rows[:, 0]))])
    dress(left, "response length, tokens", "error of the estimate, % (bars: one standard deviation)")
    dress(right, "response length, tokens", "effective sample size")


def _e8(figure: Any, series: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    for (name, curves), color in zip(series["curves"].items(), (BLUE, SKY, RED, PINK, ORANGE)):
        steps = np.arange(1, len(curves[0]) + 1)
        for curve in curves:
            axes.plot(steps, curve, color=color, linewidth=0.5, alpha=0.35)
        mean = np.mean(curves, axis=0)
        axes.plot(steps, mean, color=color, linewidth=1.8, label=f"{name}: {mean[-1]:.4f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    dress(axes, "step (512 fresh pairs each)", "JSD(target, policy), nats (thin: single seeds)")


def _e9(figure: Any, series: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = np.array(series["rows"])
    axes.plot(rows[:, 0], rows[:, 1:], ".", color=SKY, markersize=6)
    axes.plot(rows[:, 0], rows[:, 1:].mean(axis=1), "o-", color=BLUE, label="DPO, fully minimised (dots: single seeds)")
    axes.axhline(series["start"], color=GREY, linewidth=1, linestyle="--", label="no training")
    axes.set_xscale("log")
    axes.set_yscale("log")
    dress(axes, "pairs in the fixed set", "JSD(target, fit), nats")


def _e10(figure: Any, series: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    finals = []
    for (name, curves), color in zip(series["curves"].items(), (BLUE, RED, PINK, ORANGE)):
        steps = series["every"] * np.arange(len(curves[0]))
        for curve in curves:
            axes.plot(steps, curve, color=color, linewidth=0.5, alpha=0.35)
        mean = np.mean(curves, axis=0)
        finals.append(mean[-1])
        axes.plot(steps, mean, ".-", color=color, linewidth=1.8, label=f"{name}: {mean[-1]:.4f}")
    tenth = min(finals[1:]) / 10
    axes.axhline(tenth, color=GREEN, linewidth=1, linestyle="--", label="a tenth of the best of the others")
    axes.set_yscale("log")
    dress(axes, "step (4,096 fresh pairs each)", "JSD(target, policy), nats (thin: single seeds)", legend=False)
    axes.legend(fontsize=9, loc="center right", bbox_to_anchor=(1, 0.61), **_PLATE)


DRAW: Mapping[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "e1": _e1, "e2": _e2, "e3": _e3, "e4": _e4, "e5": _e5, "e6": _e6, "e7": _e7, "e8": _e8, "e9": _e9,
    "e10": _e10,
}  # fmt: skip
"""Name of the experiment -> how its series are drawn on a figure."""
