"""Semantic textual similarity of a pretrained encoder: STS12 to STS16, STS-B and SICK-R, lexical baselines beside.

    jaxlm eval --config configs/eval/sts.py --config.model=all-MiniLM-L6-v2 --config.sts=data/sts

The protocol is `jaxlm.evals.sts`: SentEval's "all". Tasks without a file are named at the end, with where to get them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from jaxlm.evals import sts
from jaxlm.evals.encode import Encoder
from jaxlm.recipes.wiring import say

Read = Callable[[], tuple[sts.Pairs, tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is evaluated. model: an encoder's folder. sts: the folder of 2012 … 2016. stsb, sick: their test files.

    A path that is None leaves its tasks out. run_dir gets table.md and results.json.
    """

    run_dir: str
    model: str
    recipe: Literal["sts"] = "sts"
    sts: str | None = None
    stsb: str | None = None
    sick: str | None = None
    batch_size: int = 32


def resolve(cfg: Config) -> Config:
    """Nothing is left open by a config of this recipe."""
    return cfg


def shrink(cfg: Config) -> Config:
    """The same evaluation: nothing here is trained."""
    return dataclasses.replace(cfg, run_dir=f"{cfg.run_dir}-shrunk")


def run(cfg: Config) -> list[sts.Result]:
    """Evaluates every task whose files are there, prints the table and names what was missing."""
    if cfg.sts is None and cfg.stsb is None and cfg.sick is None:
        raise ValueError("config: name at least one of sts (a folder), stsb and sick (files)")
    model = Encoder.load(cfg.model)
    encode = partial(model.encode, batch_size=cfg.batch_size, show_progress=True)
    results, absent = [], []
    for task, read in tasks(cfg):
        try:
            pairs, missing = read()
        except sts.MissingFiles as error:
            absent.append(str(error))
            continue
        say(f"{task}: {len(pairs.first):,} pairs" + (f", {pairs.unrated:,} without a score" if pairs.unrated else ""))
        results.append(sts.evaluate(task, pairs, encode, missing=missing))
    if not results:
        raise ValueError("no task could be evaluated:\n  " + "\n  ".join(absent))
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")
    (folder / "table.md").write_text(sts.table(results))
    say(sts.table(results))
    for line in absent:
        say(f"not evaluated: {line}")
    return results


def tasks(cfg: Config) -> Iterator[tuple[str, Read]]:
    """Name and reader of every task that the config names."""
    if cfg.sts is not None:
        for task in sts.SUBSETS:
            yield task, partial(sts.read_semeval, cfg.sts, task)
    for task, path, read in (("STS-B", cfg.stsb, sts.read_stsb), ("SICK-R", cfg.sick, sts.read_sick)):
        if path is not None:
            yield task, partial(_whole, read, path)


def _whole(read: Callable[[str], sts.Pairs], path: str) -> tuple[sts.Pairs, tuple[str, ...]]:
    return read(path), ()
