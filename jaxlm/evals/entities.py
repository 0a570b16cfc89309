"""Vectors of medical entities judged by what they are for: finding a concept's definition, and relatedness as rated.

Lexical baselines stand beside both, as everywhere.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.evals import sts
from jaxlm.evals.lexical import BASELINES, tfidf
from jaxlm.evals.retrieval import cosine_ranks, mean_reciprocal_rank, ranks, recall_at
from jaxlm.evals.sts import Encode, MissingFiles, Pairs

EHR_REL = "github.com/babylonhealth/EHR-Rel, EHR-RelB.tsv"
COLUMNS = ("snomed_label_1", "snomed_label_2", "mean_rating")


class Definitions(NamedTuple):
    """Names of concepts, and the definition of each."""

    names: list[str]
    texts: list[str]


def retrieval(definitions: Definitions, encode: Encode) -> dict[str, float]:
    """Finding each name's definition among all of them by the cosine: recall@1, recall@10 and mrr, times 100."""
    vectors = encode([*definitions.names, *definitions.texts])
    n = len(definitions.names)
    return _scores(cosine_ranks(vectors[:n], vectors[n:], np.arange(n)))


def _scores(found: np.ndarray) -> dict[str, float]:
    return {
        "recall@1": 100 * recall_at(found, 1),
        "recall@10": 100 * recall_at(found, 10),
        "mrr": 100 * mean_reciprocal_rank(found),
    }


def read_ehr_rel(path: str | Path) -> Pairs:
    """EHR-RelB: pairs of clinical concepts, and how related doctors found them (0 to 3).

    Raises MissingFiles where there is none, and ValueError naming the row for one that is not two labels and a rating.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFiles(f"{path} is not there; it can be had from {EHR_REL}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for number, row in enumerate(rows, start=2):
        try:
            if not math.isfinite(float(row["mean_rating"])) or not (row["snomed_label_1"] and row["snomed_label_2"]):
                raise ValueError("an empty label, or a rating that is no number")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: expected {', '.join(COLUMNS)}, found {row}") from error
    return Pairs(
        [row["snomed_label_1"] for row in rows],
        [row["snomed_label_2"] for row in rows],
        np.array([float(row["mean_rating"]) for row in rows]),
    )


def relatedness(pairs: Pairs, encode: Encode) -> float:
    """Spearman, times 100, of the cosine of two labels with the rating."""
    return sts.spearman(pairs, encode)


def lexical_scores(definitions: Definitions, pairs: Pairs | None) -> Mapping[str, dict[str, float]]:
    """Name of each TF-IDF baseline -> its definitions/… and ehr_rel/spearman."""
    rows: dict[str, dict[str, float]] = {}
    n = len(definitions.names)
    for name, terms in BASELINES.items():
        x = tfidf([*definitions.names, *definitions.texts], terms)
        found = _scores(ranks((x[:n] @ x[n:].T).toarray(), np.arange(n)))
        rows[name] = {f"definitions/{metric}": value for metric, value in found.items()}
    for name, value in (sts.lexical_baselines(pairs) if pairs is not None else {}).items():
        rows[name]["ehr_rel/spearman"] = value
    return rows
