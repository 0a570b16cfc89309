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

from jaxlm.evals import sphere
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
    if len(pairs.first) < 2:
        raise ValueError(f"{task}: a correlation needs at least 2 pairs with a score, found {len(pairs.first)}")
    found = scores(pairs, encode)
    return Result(
        task,
        len(pairs.first),
        pairs.unrated,
        found["spearman"],
        found["pearson"],
        lexical_baselines(pairs),
        missing,
    )


def scores(pairs: Pairs, encode: Encode, *, positive_above: float = 4.0) -> dict[str, float]:
    """The encoder alone: spearman and pearson (times 100), alignment of close pairs, uniformity of all texts.

    positive_above: pairs with a higher score are positives (STS: 4 of 5).
    """
    first, second = _unit(pairs, encode)
    cosine, close = np.sum(first * second, axis=1), pairs.score > positive_above
    return {
        "spearman": _correlation(spearmanr, cosine, pairs.score),
        "pearson": _correlation(pearsonr, cosine, pairs.score),
        "alignment": sphere.alignment(first[close], second[close]),
        "uniformity": sphere.uniformity(np.concatenate([first, second])),
    }


def spearman(pairs: Pairs, encode: Encode) -> float:
    """Spearman, times 100, of the cosines with the scores; NaN where one side is constant."""
    first, second = _unit(pairs, encode)
    return _correlation(spearmanr, np.sum(first * second, axis=1), pairs.score)


def _unit(pairs: Pairs, encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    vectors = sphere.unit(encode([*pairs.first, *pairs.second]))
    return vectors[: len(pairs.first)], vectors[len(pairs.first) :]


def lexical_baselines(pairs: Pairs) -> dict[str, float]:
    """Name -> Spearman times 100 of each TF-IDF baseline, fitted on the pairs themselves."""
    found = {name: lexical_cosines(pairs.first, pairs.second, terms) for name, terms in BASELINES.items()}
    return {name: _correlation(spearmanr, cosine, pairs.score) for name, cosine in found.items()}


def _correlation(of: Callable[..., Any], cosine: np.ndarray, score: np.ndarray) -> float:
    """Times 100; NaN where one side is constant, for then it is undefined."""
    return float("nan") if np.ptp(cosine) == 0 or np.ptp(score) == 0 else 100 * float(of(cosine, score).statistic)


def read_semeval(folder: str | Path, task: str) -> tuple[Pairs, tuple[str, ...]]:
    """(pairs, missing subsets) of one of SemEval's tasks, all its subsets one after the other.

    folder: holds 2012 … 2016. Raises MissingFiles if no file of the task is there, and ValueError naming file and row
    for one that is not score, text, text.
    """
    if task not in SUBSETS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(SUBSETS)}")
    year = Path(folder) / f"20{task[3:]}"
    files = {subset: year / f"{subset}.test.tsv" for subset in SUBSETS[task]}
    missing = tuple(subset for subset, file in files.items() if not file.is_file())
    if len(missing) == len(files):
        raise MissingFiles(f"{task}: no file of {', '.join(missing)} in {year}; they can be had from {WHERE['sts']}")
    found = [_pairs(file, _rows(file, csv.QUOTE_NONE, "\t")) for file in files.values() if file.is_file()]
    joined = Pairs(
        [text for pairs in found for text in pairs.first],
        [text for pairs in found for text in pairs.second],
        np.concatenate([pairs.score for pairs in found]),
        sum(pairs.unrated for pairs in found),
    )
    return joined, missing


def read_stsb(path: str | Path) -> Pairs:
    """The STS benchmark: a CSV of text, text, score without a header."""
    path = _existing(path, "stsb")
    return _pairs(path, [[score, a, b] for a, b, score in _rows(path, csv.QUOTE_MINIMAL, ",")])


def read_sick(path: str | Path) -> Pairs:
    """SICK-R: a TSV with the columns sentence_A, sentence_B and relatedness_score."""
    path = _existing(path, "sick")
    columns = ("relatedness_score", "sentence_A", "sentence_B")
    header, *rows = _table(path, csv.QUOTE_NONE, "\t") or [[]]
    if not set(columns) <= set(header):
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}, found {', '.join(header) or 'nothing'}")
    _check_width(path, rows, len(header), first=2)
    where = [header.index(column) for column in columns]
    return _pairs(path, [[row[i] for i in where] for row in rows], first=2)


def _existing(path: str | Path, kind: str) -> Path:
    if not Path(path).is_file():
        raise MissingFiles(f"{path} is not there; it can be had from {WHERE[kind]}")
    return Path(path)


def _rows(path: Path, quoting: int, delimiter: str) -> list[list[str]]:
    rows = _table(path, quoting, delimiter)
    _check_width(path, rows, 3, first=1)
    return rows


def _table(path: Path, quoting: int, delimiter: str) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return list(csv.reader(file, quoting=quoting, delimiter=delimiter))  # type: ignore[arg-type]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: expected a table in UTF-8: {error}") from error


def _check_width(path: Path, rows: list[list[str]], width: int, *, first: int) -> None:
    for number, row in enumerate(rows, start=first):
        if len(row) != width:
            raise ValueError(f"{path}:{number}: expected {width} columns, found {len(row)}")


def _pairs(path: Path, rows: list[list[str]], *, first: int = 1) -> Pairs:
    """Rows of score, text, text."""
    rated = [(number, row) for number, row in enumerate(rows, start=first) if row[0].strip()]
    scores = np.zeros(len(rated))
    for i, (number, row) in enumerate(rated):
        try:
            scores[i] = float(row[0])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a score, found {row[0]!r}") from error
    return Pairs([row[1] for _, row in rated], [row[2] for _, row in rated], scores, len(rows) - len(rated))


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
