"""Several variants of one run over several seeds, as a table: what an ablation is.

    jaxlm train --config configs/simcse/ablation.py:DATA

Every run has its own folder below run_dir and is resumed like any other; one that has finished is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import ml_collections
import numpy as np

from jaxlm.recipes.config import override, to_dataclass, to_dict
from jaxlm.recipes.sentences import RESULTS
from jaxlm.recipes.shrink import shrink as shrink_model
from jaxlm.recipes.wiring import say
from jaxlm.train.record import FILE, check_resumable


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is called `name` in the table. changes: "field=value" each, applied to the base."""

    name: str
    changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """A sweep. base: the config of a recipe that writes results.json.

    seeds: set in each of seed_fields. metrics: columns of the table, the scores of the trained system; rows: other
    systems of the results (a start, baselines) that stand above it. all_rows: every system of the results is trained,
    and each has its row.
    """

    run_dir: str
    base: dict[str, Any]
    variants: tuple[Variant, ...]
    metrics: tuple[str, ...]
    recipe: Literal["sweep"] = "sweep"
    seeds: tuple[int, ...] = (0, 1, 2)
    seed_fields: tuple[str, ...] = ("train.seed", "data.seed")
    rows: tuple[str, ...] = ()
    all_rows: bool = False

    def __post_init__(self) -> None:
        folders = [folder_of(variant) for variant in self.variants]
        if not folders or len(set(folders)) < len(folders) or not self.seeds:
            raise ValueError(f"a sweep needs seeds, and variants that its folders tell apart; found {folders}")


Results = Mapping[str, Mapping[str, float]]


def resolve(cfg: Config) -> Config:
    """Nothing is left open by a config of this recipe."""
    return cfg


def shrink(cfg: Config) -> Config:
    """The same variants of a base that its own recipe made small, for one seed."""
    recipe, base = _configured(cfg, (), cfg.seeds[0], Path(cfg.run_dir))
    shrunk = getattr(recipe, "shrink", shrink_model)(recipe.resolve(base))
    return dataclasses.replace(cfg, run_dir=shrunk.run_dir, base=to_dict(shrunk), seeds=cfg.seeds[:1])


def run(cfg: Config) -> dict[str, list[Results]]:
    """Runs what has not finished yet, and prints and writes the table.

    Raises ValueError if a run that has finished there had another config, and on several processes.
    """
    if jax.process_count() > 1:
        raise ValueError("a sweep runs in one process: on several hosts, start its runs one by one")
    found: dict[str, list[Results]] = {variant.name: [] for variant in cfg.variants}
    for seed in cfg.seeds:
        for variant in cfg.variants:
            folder = Path(cfg.run_dir) / f"{folder_of(variant)}-{seed}"
            recipe, run_config = _configured(cfg, variant.changes, seed, folder)
            if (folder / RESULTS).is_file() and (folder / FILE).is_file():
                recorded = json.loads((folder / FILE).read_text())["config"]
                check_resumable(recorded, to_dict(recipe.resolve(run_config)), may_change=())
            else:
                say(f"=== {variant.name}, seed {seed}: {folder}")
                recipe.run(run_config)
            found[variant.name].append(json.loads((folder / RESULTS).read_text()))
    shown = by_row(found) if cfg.all_rows else found
    text = table(shown, metrics=cfg.metrics, rows=cfg.rows)
    (Path(cfg.run_dir) / "table.md").write_text(text)
    say(text)
    return found


def folder_of(variant: Variant) -> str:
    """The name of the variant's folders.

    >>> folder_of(Variant("Temperature 0.05, no mask"))
    'temperature_0.05_no_mask'
    """
    return re.sub("[^a-z0-9.]+", "_", variant.name.lower())


def _configured(cfg: Config, changes: Sequence[str], seed: int, folder: Path) -> tuple[Any, Any]:
    """The recipe, and the config of one run."""
    values = ml_collections.ConfigDict(copy.deepcopy(cfg.base))
    for change in [*changes, *(f"{field}={seed}" for field in cfg.seed_fields), f"run_dir={folder}"]:
        override(values, change)
    recipe = importlib.import_module(f"jaxlm.recipes.{values.recipe}")
    return recipe, to_dataclass(recipe.Config, values)


def by_row(found: Mapping[str, Sequence[Results]]) -> dict[str, list[Results]]:
    """Every row of every variant as a variant of its own; one that not all seeds have is left out.

    >>> by_row({"a": [{"x": {"f1": 1.0}, "y": {"f1": 2.0}}, {"x": {"f1": 3.0}}]})
    {'x': [{'trained': {'f1': 1.0}}, {'trained': {'f1': 3.0}}]}
    """
    shown: dict[str, list[Results]] = {}
    for variant, results in found.items():
        common = [row for row in results[0] if all(row in r for r in results)]
        names = {row: row if len(found) == 1 else f"{variant}: {row}" for row in common}
        shown |= {names[row]: [{"trained": r[row]} for r in results] for row in common}
    return shown


def table(found: Mapping[str, Sequence[Results]], *, metrics: Sequence[str], rows: Sequence[str]) -> str:
    """The variants as Markdown: mean and standard deviation over the seeds, and the range where there are few.

    >>> print(table({"a": [{"trained": {"x": 1.0}}, {"trained": {"x": 3.0}}]}, metrics=("x",), rows=()))
    | | x |
    |---|---|
    | a | 2.00 ± 1.41 (1.00 to 3.00) |
    <BLANKLINE>
    """
    known = {m for results in found.values() for result in results for row in result.values() for m in row}
    if unknown := sorted(set(metrics) - known):
        raise ValueError(f"metrics: no result has {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    lines = [f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    first = next(iter(found.values()))[0]
    for row in rows:
        cells = [_cell([first[row].get(m)]) for m in metrics]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    for name, results in found.items():
        cells = [_cell([r["trained"].get(m) for r in results]) for m in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Sequence[float | None]) -> str:
    values = [value for value in found if value is not None]
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    spread = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    return f"{spread} ({min(values):.2f} to {max(values):.2f})"
