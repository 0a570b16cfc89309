"""Semantic textual similarity by SentEval's protocol "all": cosine, no regressor, one correlation per task.

A task's subsets are concatenated before the one correlation: the mean over subsets is another number, by up to ten
points. Pairs without a gold score (most of 2015's file) are dropped and counted. TF-IDF baselines stand beside every
figure, for they beat many an encoder.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr

from jaxlm.evals.lexical import BASELINES, lexical_cosines

SUBSETS: Mapping[str, tuple[str, ...]] = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "OnWN", "SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
"""SemEval's tasks and their subsets: files `sts/20YY/<subset>.test.tsv`."""

WHERE = {
    "sts": "github.com/brmson/dataset-sts, data/sts/semeval-sts (it lacks MSRvid of 2012)",
    "stsb": "github.com/PhilipMay/stsb-multi-mt, data/stsb-en-{train,dev,test}.csv",
    "sick": "github.com/brmson/dataset-sts, data/sts/sick2014/SICK_test_annotated.txt",
}
"""Folder -> where its files can be had."""

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors [n, E], as `jaxlm.evals.encode.Encoder.encode`."""


class MissingFiles(ValueError):
    """The files of a task are not there; the message says where they can be had."""


class Pairs(NamedTuple):
    """Scored pairs of texts. unrated: pairs without a score, left out."""

    first: list[str]
    second: list[str]
    score: np.ndarray
    unrated: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """Correlations of a task, times 100. baselines: Spearman of each lexical one. missing: subsets without a file."""

    task: str
    pairs: int
    unrated: int
    spearman: float
    pearson: float
    baselines: dict[str, float]
    missing: tuple[str, ...] = ()


def evaluate(task: str, pairs: Pairs, encode: Encode, *, missing: tuple[str, ...] = ()) -> Result:
    """The correlation of the cosines with the gold scores, and what TF-IDF reaches on the same pairs."""
    vectors = np.asarray(encode([*pairs.first, *pairs.second]), np.float64)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = np.sum(unit[: len(pairs.first)] * unit[len(pairs.first) :], axis=1)
    return Result(
        task,
        len(pairs.first),
        pairs.unrated,
        _correlation(spearmanr, cosine, pairs.score),
        _correlation(pearsonr, cosine, pairs.score),
        lexical_baselines(pairs),
        missing,
    )


def lexical_baselines(pairs: Pairs) -> dict[str, float]:
    """Name -> Spearman times 100 of each TF-IDF baseline, fitted on the pairs themselves."""
    found = {name: lexical_cosines(pairs.first, pairs.second, terms) for name, terms in BASELINES.items()}
    return {name: _correlation(spearmanr, cosine, pairs.score) for name, cosine in found.items()}


def _correlation(of: Callable[..., Any], cosine: np.ndarray, score: np.ndarray) -> float:
    """Times 100; NaN where one side is constant, for then it is undefined."""
    return float("nan") if np.ptp(cosine) == 0 or np.ptp(score) == 0 else 100 * float(of(cosine, score).statistic)


def read_semeval(folder: str | Path, task: str) -> tuple[Pairs, tuple[str, ...]]:
    """(pairs, missing subsets) of one of SemEval's tasks, all its subsets one after the other.

    folder: holds 2012 … 2016. Raises MissingFiles if no file of the task is there, and ValueError
    for a row that is not score, text, text.
    """
    if task not in SUBSETS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(SUBSETS)}")
    year = Path(folder) / f"20{task[3:]}"
    files = {subset: year / f"{subset}.test.tsv" for subset in SUBSETS[task]}
    missing = tuple(subset for subset, file in files.items() if not file.is_file())
    if len(missing) == len(files):
        raise MissingFiles(f"{task}: no file of {', '.join(missing)} in {year}; they can be had from {WHERE['sts']}")
    rows = [row for file in files.values() if file.is_file() for row in _rows(file, csv.QUOTE_NONE, "\t")]
    return _pairs([(score, first, second) for score, first, second in rows]), missing


def read_stsb(path: str | Path) -> Pairs:
    """The STS benchmark: a CSV of text, text, score without a header."""
    return _pairs([(score, a, b) for a, b, score in _rows(_existing(path, "stsb"), csv.QUOTE_MINIMAL, ",")])


def read_sick(path: str | Path) -> Pairs:
    """SICK-R: a TSV with the columns sentence_A, sentence_B and relatedness_score."""
    with _existing(path, "sick").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = ("relatedness_score", "sentence_A", "sentence_B")
    if rows and not set(columns) <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}, found {', '.join(map(str, rows[0]))}")
    return _pairs([(row[columns[0]], row[columns[1]], row[columns[2]]) for row in rows])


def _existing(path: str | Path, kind: str) -> Path:
    if not Path(path).is_file():
        raise MissingFiles(f"{path} is not there; it can be had from {WHERE[kind]}")
    return Path(path)


def _rows(path: Path, quoting: int, delimiter: str) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, quoting=quoting, delimiter=delimiter))  # type: ignore[arg-type]
    for number, row in enumerate(rows, start=1):
        if len(row) != 3:
            raise ValueError(f"{path}:{number}: expected three columns, found {len(row)}")
    return rows


def _pairs(rows: list[tuple[str, str, str]]) -> Pairs:
    rated = [row for row in rows if row[0].strip()]
    scores = np.array([float(score) for score, *_ in rated])
    return Pairs([a for _, a, _ in rated], [b for *_, b in rated], scores, len(rows) - len(rated))


def table(results: Sequence[Result]) -> str:
    """The results as Markdown, the baselines beside, and their plain mean."""
    names = list(BASELINES)
    lines = [f"| task | pairs | Spearman | Pearson | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for r in results:
        without = f" (without {', '.join(r.missing)})" if r.missing else ""
        figures = [r.spearman, r.pearson, *(r.baselines[name] for name in names)]
        lines.append(f"| {r.task}{without} | {r.pairs:,} | " + " | ".join(f"{x:.2f}" for x in figures) + " |")
    means = [
        float(np.mean(column))
        for column in zip(*([r.spearman, r.pearson, *(r.baselines[n] for n in names)] for r in results))
    ]
    return "\n".join([*lines, "| mean | | " + " | ".join(f"{x:.2f}" for x in means) + " |"]) + "\n"
