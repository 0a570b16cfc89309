"""The way of a run over the plane of alignment and uniformity, as a PNG."""

from __future__ import annotations

from pathlib import Path

from jaxlm.train.metrics import read_lines

POINT = ("uniformity", "alignment", "spearman")


def sphere_points(metrics_path: str | Path, prefix: str) -> list[dict[str, float]]:
    """The evaluations in a `metrics.jsonl` that have `<prefix>/uniformity`, `/alignment` and `/spearman`, with step."""
    lines = [line for line in read_lines(metrics_path) if all(line.get(f"{prefix}/{n}") is not None for n in POINT)]
    return [{"step": line["step"], **{name: line[f"{prefix}/{name}"] for name in POINT}} for line in lines]


def plot_sphere(metrics_path: str | Path, out: str | Path, *, prefix: str) -> Path:
    """Draws each evaluation as a point (uniformity, alignment), coloured by Spearman; lower left is better.

    Raises ValueError if no line of the file has them.
    """
    points = sphere_points(metrics_path, prefix)
    if not points:
        raise ValueError(f"{metrics_path}: no line has {', '.join(f'{prefix}/{name}' for name in POINT)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y, score = ([point[name] for point in points] for name in POINT)
    figure = Figure(figsize=(7, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, y, color="#bbbbbb", linewidth=0.9, zorder=1)
    drawn = axes.scatter(x, y, c=score, cmap="viridis", s=32, zorder=2)
    for point, at in {0: (-6, 6), len(points) - 1: (6, -12)}.items():
        text, where = f"step {points[point]['step']}", (x[point], y[point])
        axes.annotate(
            text, where, textcoords="offset points", xytext=at, fontsize=8, ha="left" if at[0] > 0 else "right"
        )
    axes.margins(0.1)
    axes.set_xlabel("uniformity (lower is better)")
    axes.set_ylabel("alignment (lower is better)")
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(drawn, label="Spearman x 100")
    figure.savefig(out, dpi=200)
    return Path(out)
