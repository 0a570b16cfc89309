"""Examples:

  jaxlm report runs/quickstart
  jaxlm report runs/a runs/b --out compare.html

One page about one run or several: curves of every metric, what each run reached, where its time went over all its
starts (goodput), and in what their configs differ. The page is one file, whole in itself: it can be mailed. The same
figures are printed.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.recipes.describe import bytes_text
from jaxlm.train.goodput import CLASSES, account, read_timeline
from jaxlm.train.goodput import FILE as TIMELINE
from jaxlm.train.metrics import read_lines
from jaxlm.train.record import FILE, flat

PAGE = Path(__file__).with_suffix(".html")
MOST_POINTS = 2000
"""Of a curve on the page: as many as a wide screen has columns."""


class RunReport(NamedTuple):
    """A run. curves: of every metric, its steps and values. facts: what it reached, as a person reads it. seconds: of
    every class of time, see `jaxlm.train.goodput`. config: the values by dotted name."""

    name: str
    curves: dict[str, tuple[list[int], list[float]]]
    facts: dict[str, str]
    seconds: dict[str, float]
    config: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default: RUN/report.html)")


def main(args: argparse.Namespace) -> int:
    """Prints the figures and writes the page."""
    found = [read_run(folder, name) for folder, name in zip(args.runs, names(args.runs))]
    print(text(found))
    out = args.out or args.runs[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(found), encoding="utf-8")
    print(f"page: {out}")
    return 0


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    >>> names([Path("runs/a/cot"), Path("runs/b/cot")]), names([Path("runs/a"), Path("runs/b")])
    (['a/cot', 'b/cot'], ['a', 'b'])
    """
    parts = [folder.resolve().parts for folder in folders]
    for number in range(1, max(map(len, parts)) + 1):
        found = ["/".join(p[-number:]) for p in parts]
        if len(set(found)) == len(found):
            return found
    raise ValueError(f"expected different runs, found {', '.join(map(str, folders))}")


def read_run(folder: Path, name: str) -> RunReport:
    """What is written in a run's folder; ValueError if nothing is."""
    lines = read_lines(folder / "metrics.jsonl")
    if not lines or not (folder / FILE).exists():
        raise ValueError(
            f"{folder}: expected the folder of a run that has begun, with {FILE} and metrics.jsonl; a recipe of "
            "several stages has one for each"
        )
    record = json.loads((folder / FILE).read_text())
    events = read_timeline(folder / TIMELINE)
    seconds = account(events)
    metrics = dict.fromkeys(metric for line in lines for metric in line if metric != "step")
    curves = {metric: curve(lines, metric) for metric in metrics}
    found = facts(lines, record, seconds) | {"starts": str(sum(event["event"] == "start" for event in events))}
    return RunReport(name, curves, found, seconds, flat(record.get("config", {})))


def curve(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of a metric; of very many, every so many-th and the last."""
    points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    every = math.ceil(len(points) / MOST_POINTS) or 1
    kept = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    return [step for step, _ in kept], [value for _, value in kept]


def facts(
    lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, str]:
    """What a run reached, a line each."""
    of = {name: [line[name] for line in lines if line.get(name) is not None] for name in (
        "train/loss", "perf/tokens_per_s", "perf/steps_per_s", "perf/mfu", "perf/rss_bytes", "perf/device_peak_bytes"
    )}  # fmt: skip
    found = {"steps": f"{lines[-1]['step']:,}"}
    if of["train/loss"]:
        found["last loss"] = f"{of['train/loss'][-1]:.4f}"
    for name, what in (("perf/tokens_per_s", "tokens/s"), ("perf/steps_per_s", "steps/s")):
        if of[name]:
            middle = statistics.median(of[name])
            found[f"{what}, median"] = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
    if of["perf/mfu"]:
        found["MFU, median"] = f"{100 * statistics.median(of['perf/mfu']):.1f} %"
    for name, what in (("perf/rss_bytes", "host memory, most"), ("perf/device_peak_bytes", "device memory, most")):
        if of[name]:
            found[what] = bytes_text(int(max(of[name])))
    platform = record.get("platform", {})
    found["devices"] = f"{platform.get('num_devices', '?')} x {platform.get('device_kind', '?')}"
    whole = sum(seconds.values())
    if whole:
        found["time"] = duration(whole)
        found["goodput"] = f"{100 * seconds['steps'] / whole:.1f} %"
    return found


def duration(seconds: float) -> str:
    """As a person says it.

    >>> duration(75), duration(8100), duration(3.2)
    ('1 min 15 s', '2 h 15 min', '3.2 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def differences(runs: Sequence[RunReport]) -> dict[str, list[Any]]:
    """The config's fields that are not the same in all runs, and the value in each; None where a run has none."""
    fields = dict.fromkeys(field for run in runs for field in run.config)
    found = {field: [run.config.get(field) for run in runs] for field in fields}
    return {field: values for field, values in found.items() if any(value != values[0] for value in values)}


def text(runs: Sequence[RunReport]) -> str:
    """The figures for a terminal."""
    lines = []
    for run in runs:
        lines.append(f"{run.name}: " + ", ".join(f"{value} {what}" for what, value in run.facts.items()))
        whole = sum(run.seconds.values())
        if whole:
            shares = sorted(((run.seconds[name], name) for name in CLASSES), reverse=True)
            lines.append("  " + ", ".join(f"{name} {100 * s / whole:.1f} %" for s, name in shares if s / whole >= 5e-4))
    for field, values in differences(runs).items():
        lines.append(f"{field}: " + " | ".join(map(str, values)))
    return "\n".join(lines)


def page(runs: Sequence[RunReport]) -> str:
    """The page."""
    # Inside a script only "</" could end it, and "<!--" open a comment; text goes to the page as text, never as HTML.
    data = {"runs": [run._asdict() | {"config": {}} for run in runs], "classes": CLASSES, "differs": differences(runs)}
    title = html.escape(", ".join(run.name for run in runs))
    filled = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("{{title}}", title).replace("{{data}}", filled)
