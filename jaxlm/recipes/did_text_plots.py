"""The picture of E11: what DPO did to the test pairs while it trained, and how the theory fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.recipes.did_plots import BLUE, GREEN, GREY, ORANGE, RED, dress
from jaxlm.train.metrics import read_lines

PANELS: tuple[tuple[str, str, dict[str, tuple[str, str, str]]], ...] = (
    ("rewards on the test pairs", "reward", {
        "rewards_chosen": ("chosen", BLUE, "-"), "rewards_rejected": ("rejected", RED, "-"),
        "margins": ("margin", GREY, "--"),
    }),
    ("share of pairs ordered by the reward", "accuracy", {"accuracies": ("reward accuracy", GREEN, "-")}),
    ("displacement of log-probabilities", "nats per reply", {
        "displacement_chosen": ("chosen, observed", BLUE, "-"),
        "displacement_chosen_predicted": ("chosen, predicted", BLUE, ":"),
        "displacement_rejected": ("rejected, observed", RED, "-"),
        "displacement_rejected_predicted": ("rejected, predicted", RED, ":"),
    }),
)  # fmt: skip


def plot(runs: Mapping[int, Path], results: Mapping[str, Mapping[str, float]], out: Path) -> Path:
    """Curves over the updates, every seed a thin line and their mean a thick one; the last panel is the power law."""
    # Its own canvas instead of pyplot: no global state, and nothing that looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=180, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("E11  DPO on real pairs: three models per seed", x=0.01, ha="left", fontsize=12)
    axes = figure.subplots(2, 2).ravel()
    lines = {seed: [x for x in read_lines(run / "metrics.jsonl") if "test/loss" in x] for seed, run in runs.items()}
    for ax, (title, unit, names) in zip(axes, PANELS):
        for name, (label, color, style) in names.items():
            _draw(ax, lines, f"test/{name}", label, color, style)
        ax.set_title(title, loc="left", fontsize=10)
        dress(ax, "updates", unit)
    _draw_law(axes[3], results)
    figure.savefig(out, dpi=180)
    return out


def _draw(ax: Any, lines: Mapping[int, list[dict[str, Any]]], name: str, label: str, color: str, style: str) -> None:
    curves = [([x["step"] for x in seed], [x[name] for x in seed]) for seed in lines.values()]
    for steps, values in curves:
        ax.plot(steps, values, style, color=color, linewidth=0.6, alpha=0.5)
    ax.plot(curves[0][0], np.mean([v for _, v in curves], axis=0), style, color=color, linewidth=2, label=label)


def _draw_law(ax: Any, results: Mapping[str, Mapping[str, float]]) -> None:
    names = {"power_law_slope": "slope", "power_law_r2": "R²", "ordered_share": "ordered share"}
    for i, (name, color) in enumerate(zip(names, (BLUE, ORANGE, GREEN))):
        values = [r[name] for r in results.values()]
        ax.bar(i, np.mean(values), 0.5, color=color)
        ax.plot([i] * len(values), values, ".", color="black", markersize=4)
    ax.axhline(1 / 3, color=GREY, linewidth=0.8, linestyle=":", label="ordered share of independent models, 1/3")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(names)), list(names.values()))
    ax.set_title("the power law between three models (dots: seeds)", loc="left", fontsize=10)
    dress(ax, "", "")
