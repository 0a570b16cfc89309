"""Retrieval: at which rank a query finds what belongs to it, by scores or by the cosine of vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxlm.evals.sphere import unit

# Cosines of float32 vectors that lie closer are ties: what tells them apart is rounding.
COSINE_TOLERANCE = 1e-6


def ranks(scores: np.ndarray, positive: np.ndarray, *, tolerance: float = 0.0) -> np.ndarray:
    """The rank of each query's best positive among all that is not one, int64 [Q], from 1 for the best.

        rank_q = 1 + #{n not positive for q: scores_qn >= max over q's positives p of scores_qp - tolerance}

    scores: [Q, N], higher is nearer; -inf takes a candidate out. positive: the positive's column, integers [Q], or a
    mask [Q, N] where True is a positive, at least one per query. Ties count against the query, so scores that do not
    tell anything apart earn rank N and not 1. Positives do not stand in each other's way.

    Raises ValueError for shapes that do not fit, NaN, and a query without a positive.

    >>> ranks(np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1]]), np.array([2, 0])).tolist()
    [2, 2]
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores: expected [queries, candidates], found shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"scores: NaN in row {int(np.isnan(scores).any(1).argmax())}: no rank follows from it")
    mask = _mask(_checked(positive, *scores.shape), scores.shape[1])
    best = np.max(scores, axis=1, keepdims=True, where=mask, initial=-np.inf)
    return 1 + np.count_nonzero((scores >= best - tolerance) & ~mask, axis=1)


def cosine_ranks(query: np.ndarray, key: np.ndarray, positive: np.ndarray, *, block_size: int = 1024) -> np.ndarray:
    """`ranks` by the cosine of vectors, int64 [Q], without ever holding all Q x N cosines.

    query: [Q, E]; key: [N, E]; positive: as in `ranks`. block_size: queries at a time, so memory is for
    block_size * N cosines in float32. Cosines within 1e-6 are ties. A vector of zeros has the cosine 0 with everything.

    Raises ValueError as `ranks` does, and for vectors that are not finite.

    >>> cosine_ranks(np.eye(3), 2 * np.eye(3) + 0.1, np.arange(3), block_size=2).tolist()
    [1, 1, 1]
    """
    positive = _checked(positive, len(query), len(key))
    parts = [ranks(c, positive[rows], tolerance=COSINE_TOLERANCE) for rows, c in _cosines(query, key, block_size)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def nearest(query: np.ndarray, key: np.ndarray, *, count: int, block_size: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """The keys of the highest cosine with each query, the nearest first: (columns int64, cosines float32), [Q, count].

    Of equal ones, the earlier key comes first. Arguments and memory as in `cosine_ranks`; count: 1 to N.

    >>> nearest(np.array([[1.0, 0.1]]), np.array([[0.0, 1.0], [2.0, 0.0]]), count=1)[0].tolist()
    [[1]]
    """
    if not 1 <= count <= len(key):
        raise ValueError(f"count: expected 1 to {len(key)}, the number of keys, found {count}")
    columns, cosines = np.zeros((len(query), count), np.int64), np.zeros((len(query), count), np.float32)
    for rows, block in _cosines(query, key, block_size):
        columns[rows] = np.argsort(-block, axis=1, kind="stable")[:, :count]
        cosines[rows] = np.take_along_axis(block, columns[rows], axis=1)
    return columns, cosines


def recall_at(ranks: np.ndarray, k: int) -> float:
    """The share of queries whose positive is among the first k, in [0, 1].

        recall@k = mean over q of [rank_q <= k]

    Where queries have several positives this is the share that finds any of them (the hit rate, or success@k).

    >>> recall_at(np.array([1, 3, 2, 10]), 2)
    0.5
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    return float(np.mean(_some(ranks) <= k))


def mean_reciprocal_rank(ranks: np.ndarray) -> float:
    """The mean of 1 / rank, in (0, 1]: 1 where every query finds its positive first.

        MRR = mean over q of 1 / rank_q

    Source: Voorhees, The TREC-8 Question Answering Track Report, 1999, section 3.

    >>> mean_reciprocal_rank(np.array([1, 4, 2]))
    0.5833333333333334
    """
    return float(np.mean(1 / _some(ranks)))


def _some(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not len(ranks) or ranks.min() < 1:
        found = f"shape {ranks.shape}" if ranks.ndim != 1 or not len(ranks) else f"a rank of {ranks.min()}"
        raise ValueError(f"ranks: expected one per query, at least one, from 1 for the best; found {found}")
    return ranks


def _checked(positive: np.ndarray, num_queries: int, num_keys: int) -> np.ndarray:
    """Columns [Q] or a mask [Q, N], as given."""
    positive = np.asarray(positive)
    is_mask, is_columns = positive.dtype == bool, np.issubdtype(positive.dtype, np.integer)
    wanted = (num_queries, num_keys) if is_mask else (num_queries,)
    if not (is_mask or is_columns) or positive.shape != wanted:
        raise ValueError(
            f"positive: expected columns, integers [{num_queries}], or a mask, booleans [{num_queries}, {num_keys}]; "
            f"found {positive.dtype} {list(positive.shape)}"
        )
    bad = ~positive.any(axis=1) if is_mask else (positive < 0) | (positive >= num_keys)
    if bad.any():
        row = int(bad.argmax())
        what = "no positive" if is_mask else f"column {positive[row]} of {num_keys}"
        raise ValueError(f"positive: query {row} has {what}; leave out queries that have nothing to find")
    return positive


def _mask(positive: np.ndarray, num_keys: int) -> np.ndarray:
    return positive if positive.dtype == bool else positive[:, None] == np.arange(num_keys)


def _cosines(query: np.ndarray, key: np.ndarray, block_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(which queries, their cosines with all keys, float32 [rows, N]), block by block."""
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1 query, found {block_size}")
    query, key = _unit(query, "query"), _unit(key, "key")
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"query and key: expected one width, found {query.shape[1]} and {key.shape[1]}")
    for start in range(0, len(query), block_size):
        rows = slice(start, start + block_size)
        yield rows, query[rows] @ key.T


def _unit(vectors: np.ndarray, name: str) -> np.ndarray:
    """The vectors at length 1, float32."""
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2:
        raise ValueError(f"{name}: expected vectors [count, width], found shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{name}: vector {int((~np.isfinite(vectors)).any(1).argmax())} is not finite: no cosine")
    return unit(vectors).astype(np.float32)
