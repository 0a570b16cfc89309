"""What an answer of `sentence_by_sentence` costs, and the plot of accuracy against it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.analysis import sentence_flops as flops
from jaxlm.analysis.sentence_flops import HeadAt
from jaxlm.recipes.sentence_data import Task

if TYPE_CHECKING:
    from jaxlm.recipes.sentence_by_sentence import Config

HEADS: tuple[HeadAt, ...] = ("every", "last")


def costs(cfg: Config, task: Task, rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """MFLOPs of an answer, averaged over the test samples, by way of inference: with the head at every position of the
    question, and at its last alone.

    Lengths are those of right answers, but for the number of sentences of a way that ends by itself (`sentences` of its
    row). Only the answer's sentence of a continuous way is written.
    """
    assert cfg.model is not None  # resolve
    model, found = cfg.model, task.rows["test"]
    segments = found.extra["step_segments"].sum(axis=-1)
    number = (segments > 0).sum(axis=-1)
    question = float(np.mean([len(ids) for ids in found.columns["question"].tokens]))
    written, sentences = float(segments.sum(axis=-1).mean()), float(number.mean())
    answer = float(segments[np.arange(len(number)), number - 1].mean())
    kinds = {latent.name: latent.vectors for latent in cfg.latents}
    thoughts = {x.name: x.num_stages * x.thoughts_per_step for x in cfg.curricula}

    def count(row: str, head_at: HeadAt) -> float | None:
        name, _, way = row.partition(" ")
        if name in ("direct", "cot"):
            return flops.token_by_token(model, question, answer if name == "direct" else written, head_at=head_at)
        if name in thoughts:
            return flops.thoughts(model, question, thoughts[name], answer, head_at=head_at)
        if way == "discretized":
            contextual = kinds[name] != "semantic"
            return flops.discretized(model, question, sentences, written, contextual=contextual, head_at=head_at)
        if way.startswith("continuous"):
            rolled, classifier = rows[row].get("sentences", sentences), way.endswith("classifier")
            return flops.continuous(model, question, rolled, answer, classifier=classifier, head_at=head_at)
        return None

    counted = {row: {f"MFLOP, head {at}": count(row, at) for at in HEADS} for row in rows}
    return {row: {k: v / 1e6 for k, v in cost.items() if v is not None} for row, cost in counted.items()}


def plot_costs(rows: Mapping[str, Mapping[str, float]], out: str | Path) -> Path | None:
    """Draws accuracy against FLOPs, a panel for each convention of the head; None where no row has both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [f"MFLOP, head {at}" for at in HEADS]
    drawn = {name: row for name, row in rows.items() if "accuracy" in row and columns[0] in row}
    if not drawn:
        return None
    figure = Figure(figsize=(10, 4.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), sharey=True)
    for axes, column in zip(panels, columns):
        for i, (name, row) in enumerate(drawn.items()):
            style = dict(marker="os^Dv"[i // 10 % 5], color=f"C{i % 10}", linestyle="none", markersize=6)
            axes.plot(row[column], row["accuracy"], label=name, **style)
        axes.set_xlabel(f"{column.replace('MFLOP', 'MFLOP an answer')} position of the question")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("right answers, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(out)
    return Path(out)
