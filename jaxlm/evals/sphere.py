"""Alignment and uniformity of sentence vectors, over whole sets and in float64.

The losses of the same names are `jaxlm.losses.contrastive`'s, for a batch on a device.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK = 1024


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows at length 1, float64 [n, E]; a zero row stays zero.

    >>> unit(np.array([[3.0, 4.0]])).tolist()
    [[0.6, 0.8]]
    """
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """How far positive pairs are apart; lower is better.

        mean_i |x_i / |x_i| - y_i / |y_i||^2

    first, second: [n, E]. Result in [0, 4]; NaN without a pair. Source: Wang and Isola 2020, arXiv:2005.10242.

    >>> alignment(np.eye(2), np.eye(2)[::-1])
    2.0
    """
    if not len(first):
        return math.nan
    return float(np.mean(np.sum((unit(first) - unit(second)) ** 2, axis=1)))


def uniformity(vectors: np.ndarray, *, t: float = 2.0) -> float:
    """How evenly vectors cover the sphere; lower is better.

        log mean_{i < j} exp( -t |x_i / |x_i| - x_j / |x_j||^2 )

    vectors: [n, E], n at least 2. Result: at most 0, which is full collapse. Memory: 1,024 rows of the square at a
    time. Source: Wang and Isola 2020, arXiv:2005.10242.

    >>> uniformity(np.eye(3))
    -4.0
    """
    n = len(vectors)
    if n < 2:
        raise ValueError(f"uniformity compares vectors with one another: expected at least 2, found {n}")
    x, total = unit(vectors), 0.0
    for start in range(0, n, BLOCK):
        # Entry [i, j] of the block is the pair (start + i, start + j): those above the diagonal, each pair once.
        rows = np.exp(-t * np.maximum(2 - 2 * x[start : start + BLOCK] @ x[start:].T, 0))
        total += float(np.triu(rows, k=1).sum())
    return math.log(total / (n * (n - 1) / 2))
