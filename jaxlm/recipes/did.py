"""Differential information in DPO (Won et al. 2025, arXiv:2505.23761): the theory as experiments that can fail.

    jaxlm train --config configs/did/exact.py

E1 to E9 are exact, or nearly so, on finite response sets, and E10 trains a language model whose responses can all be
enumerated; together they take a few minutes on two CPU cores. Each measures quantities with the range that they must
fall in, and draws a plot. Started again, the recipe runs only what its results.json does not hold for the same settings
(delete that file after a change of the code).

What is the paper's (its abstracts, version 1's Definition 3.1 and Theorems 3.2 and 3.3, and its reviews):
    the DID, q ∝ policy / reference                            `analysis.did.did`
    preferences as evidence, and the power law                 `preference_probability`, `power_law`; E5
    the log-ratio reward is the only one that learns the target of power-law data                       E1, E8, E10
    that the optimal rejected distribution has a closed form; log-margin ordered policies               E2, E5
    a DID of low entropy reinforces, one of high entropy smooths                                        E6
    importance sampling of the DID entropy                                                              E7
What is derived here, and checked by these experiments:
    the closed form itself, and what DPO reaches from any other rejected distribution                   E2
    one curve, reference * exp(s reward), that holds all of these distributions    `analysis.did.tilt`
    displacement: by how much the log-probabilities of both responses must change, and the crossover    E3, E4
    CPO on the same data learns the DID itself, not the target                                          E1
    the condition of E6: low entropy reinforces where the log-probabilities of the reference are skewed to the right
        (few likely responses, as in text); where they are symmetric the draw decides, skewed to the left it is reversed
    the formula of the estimator, its bias and its floor; the token-level entropy as its stable companion       E7
    that DPO fully minimised on a fixed set overfits                                                    E9
What is unknown: the data, sizes, benchmarks and scores of the paper's own experiments, and what its "DPO-PG" is. No
number here is the paper's.
Deviations: its real-data experiments are not reproduced. E11, on real text, is a recipe of its own: `did_text`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm.recipes import did_exact, did_language, did_sampled
from jaxlm.recipes.did_checks import Check, Result, Settings
from jaxlm.recipes.did_plots import plot
from jaxlm.train.record import versions

EXPERIMENTS: Mapping[str, Callable[[Settings], Result]] = {
    "e1": did_exact.e1, "e2": did_exact.e2, "e3": did_exact.e3, "e4": did_exact.e4, "e5": did_exact.e5,
    "e6": did_sampled.e6, "e7": did_sampled.e7, "e8": did_sampled.e8, "e9": did_sampled.e9,
    "e10": did_language.e10,
}  # fmt: skip
"""Name -> experiment, a function of the settings to a `Result`; its plot is in `did_plots.py`."""

Name = Literal["e1", "e2", "e3", "e4", "e5", "e6", "e7", "e8", "e9", "e10"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Which experiments to run, in this order, and their sizes; figures are judged at the default settings only.

    run_dir gets results.json, table.md and one PNG per experiment.
    """

    run_dir: str
    recipe: Literal["did"] = "did"
    experiments: tuple[Name, ...] = ("e1", "e2", "e3", "e4", "e5", "e6", "e7", "e8", "e9", "e10")
    settings: Settings = Settings()


def resolve(cfg: Config) -> Config:
    """Nothing is left open by a config of this recipe."""
    return cfg


def shrink(cfg: Config) -> Config:
    """The same experiments on small sets, in seconds; what holds only at the reference settings is not judged."""
    small = Settings(
        num_responses=8, num_seeds=3, num_steps=100, num_repeats=20, num_pairs=(1_000,), num_zipf=60,
        language_length=3, num_language_steps=50,
    )  # fmt: skip
    return dataclasses.replace(cfg, run_dir=f"{cfg.run_dir}-shrunk", settings=small)


def run(cfg: Config) -> list[Result]:
    """Runs what is missing, draws, and prints the table; ValueError names the checks that failed, if any."""
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stored = _load(folder / "results.json")
    settings = json.loads(json.dumps(dataclasses.asdict(cfg.settings)))
    results = []
    for name in cfg.experiments:
        entry = stored.get(name)
        if entry is not None and entry["settings"] == settings:
            result, origin = _from_json(entry["result"]), "done before"
        else:
            start = time.perf_counter()
            result = run_experiment(name, cfg.settings)
            seconds = time.perf_counter() - start
            stored[name] = dict(settings=settings, seconds=round(seconds, 2), result=dataclasses.asdict(result))
            _save(folder / "results.json", stored)
            origin = f"{seconds:.1f} s"
        plot(result, folder / f"{name}.png")
        results.append(result)
        passed = sum(check.passed for check in result.checks)
        verdict = "pass" if result.passed else "FAIL"
        print(f"{name}  {verdict}  {passed} of {len(result.checks)}  ({origin})  {result.title}", flush=True)
    (folder / "table.md").write_text(table(results))
    failed = [f"{r.name}: {_describe(c)}" for r in results for c in r.checks if not c.passed]
    print(f"table and plots: {folder}", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} checks failed:\n  " + "\n  ".join(failed))
    return results


def run_experiment(name: str, settings: Settings) -> Result:
    """One experiment in float64; away from the reference settings, without the ranges that hold only there."""
    with jax.enable_x64(True):
        result = EXPERIMENTS[name](settings)
    if settings == Settings():
        return result
    return dataclasses.replace(
        result,
        checks=tuple(dataclasses.replace(c, low=None, high=None) if c.at_reference_only else c for c in result.checks),
    )


def table(results: list[Result]) -> str:
    """Every measured number beside its range, as Markdown."""
    lines = ["| experiment | quantity | measured | expected | |", "|---|---|---|---|---|"]
    for result in results:
        lines.append(f"| **{result.name.upper()}** | **{result.title}** | | | |")
        for check in result.checks:
            mark = "" if check.low is None and check.high is None else "pass" if check.passed else "**FAIL**"
            lines.append(f"| | {check.name} | {check.value:.4g} | {_expected(check)} | {mark} |")
    return "\n".join(lines) + "\n"


def _expected(check: Check) -> str:
    if check.low is not None and check.high is not None:
        return f"{check.low:.4g} to {check.high:.4g}"
    if check.low is not None:
        return f"at least {check.low:g}"
    return "" if check.high is None else f"at most {check.high:g}"


def _describe(check: Check) -> str:
    return f"{check.name}: measured {check.value:.6g}, expected {_expected(check)}"


def _from_json(values: dict[str, Any]) -> Result:
    return Result(**{**values, "checks": tuple(Check(**check) for check in values["checks"])})


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["experiments"] if path.is_file() else {}


def _save(path: Path, experiments: dict[str, Any]) -> None:
    """Replaces the file in one move, so that a kill leaves the old or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(versions=versions(), experiments=experiments), indent=1))
    partial.replace(path)
