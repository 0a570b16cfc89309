"""Ranks against their definition and scikit-learn, ties, several positives, and cosines in blocks."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.evals.retrieval import cosine_ranks, mean_reciprocal_rank, nearest, ranks, recall_at


def by_definition(scores, mask):
    """The place of the first positive in a list sorted by score, where ties put the others first."""
    found = []
    for row, positive in zip(scores, mask):
        best = max(range(len(row)), key=lambda n: (positive[n], row[n]))
        order = sorted(range(len(row)), key=lambda n: (-row[n], n == best))
        found.append([n for n in order if not positive[n] or n == best].index(best) + 1)
    return found


@pytest.fixture
def scores():
    return np.random.default_rng(0).integers(0, 12, (50, 17)) / 4  # many ties


def test_ranks_are_those_of_the_definition(scores):
    rng = np.random.default_rng(1)
    columns = rng.integers(0, 17, 50)
    assert ranks(scores, columns).tolist() == by_definition(scores, columns[:, None] == np.arange(17))
    mask = rng.random((50, 17)) < 0.2
    mask[np.arange(50), columns] = True
    assert ranks(scores, mask).tolist() == by_definition(scores, mask)
    assert (ranks(scores, mask) <= ranks(scores, columns)).all()


def test_scikit_learn_has_the_same_figures(scores):
    metrics = pytest.importorskip("sklearn.metrics")
    columns = np.random.default_rng(2).integers(0, 17, 50)
    one_hot = columns[:, None] == np.arange(17)
    found = ranks(scores, columns)
    assert mean_reciprocal_rank(found) == pytest.approx(metrics.label_ranking_average_precision_score(one_hot, scores))
    assert found.mean() == pytest.approx(metrics.coverage_error(one_hot, scores))
    distinct = scores + np.random.default_rng(3).random(scores.shape) / 100  # it is lenient with ties
    for k in (1, 3, 10):
        expected = metrics.top_k_accuracy_score(columns, distinct, k=k, labels=np.arange(17))
        assert recall_at(ranks(distinct, columns), k) == pytest.approx(expected)


def test_ties_count_against_the_query_and_minus_infinity_takes_out():
    assert ranks(np.zeros((2, 5)), np.array([0, 4])).tolist() == [5, 5]
    scores = np.array([[1.0, 1.0, -np.inf, 3.0]])
    assert ranks(scores, np.array([1])).tolist() == [3]
    assert ranks(scores, np.array([[True, True, False, False]])).tolist() == [2]
    assert ranks(np.array([[1.0, 1.0 + 1e-7]]), np.array([1]), tolerance=1e-6).tolist() == [2]


@pytest.mark.parametrize("block_size", [1, 7, 1024])
def test_cosines_in_blocks(block_size):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(40, 6)) * rng.uniform(0.1, 9, (40, 1)), rng.normal(size=(25, 6))
    key[3], query[5] = key[8], 0  # two alike keys; a query that is like nothing
    cosine = query @ key.T / np.maximum(np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(key, axis=1), 1e-300)
    columns = rng.integers(0, 25, 40)
    mask = (rng.random((40, 25)) < 0.1) | (columns[:, None] == np.arange(25))
    for positive in (columns, mask):
        found = cosine_ranks(query, key, positive, block_size=block_size)
        assert found.tolist() == ranks(cosine, positive, tolerance=1e-9).tolist()
    where, near = nearest(query, key, count=4, block_size=block_size)
    np.testing.assert_array_equal(np.delete(where, 5, 0), np.delete(np.argsort(-cosine, 1, "stable")[:, :4], 5, 0))
    np.testing.assert_allclose(near, -np.sort(-cosine, axis=1)[:, :4], atol=1e-6)
    assert cosine_ranks(np.zeros((0, 6)), key, np.zeros(0, int), block_size=block_size).shape == (0,)


def test_vectors_that_are_all_alike_find_nothing_first():
    same = np.tile(np.random.default_rng(0).normal(size=(1, 33)), (101, 1))
    assert set(cosine_ranks(same * 3, same, np.arange(101), block_size=8)) == {101}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks(np.zeros(3), np.zeros(3, int)), r"scores: expected .queries, candidates., found shape \(3,\)"),
        (lambda: ranks(np.array([[0.0], [np.nan]]), np.zeros(2, int)), "scores: NaN in row 1"),
        (lambda: ranks(np.zeros((2, 3)), np.array([0, 3])), "query 1 has column 3 of 3; leave out queries"),
        (lambda: ranks(np.zeros((2, 3)), np.eye(2, 3) > 2), "query 0 has no positive; leave out"),
        (lambda: ranks(np.zeros((2, 3)), np.zeros(2)), r"expected columns, integers .2., or .* found float64 \[2\]"),
        (lambda: ranks(np.zeros((2, 3)), np.ones((3, 2), bool)), r"booleans \[2, 3\]; found bool \[3, 2\]"),
        (lambda: cosine_ranks(np.zeros((2, 3)), np.zeros((2, 4)), np.arange(2)), "one width, found 3 and 4"),
        (lambda: cosine_ranks(np.full((2, 3), np.inf), np.zeros((2, 3)), np.arange(2)), "query: vector 0 is not finit"),
        (lambda: cosine_ranks(np.zeros((2, 3)), np.zeros((2, 3)), np.arange(2), block_size=0), "block_size: expected"),
        (lambda: nearest(np.zeros((2, 3)), np.zeros((2, 3)), count=3), "count: expected 1 to 2, .* found 3"),
        (lambda: nearest(np.zeros(3), np.zeros((2, 3)), count=1), "query: expected vectors"),
        (lambda: recall_at(np.array([1]), 0), "k: expected at least 1, found 0"),
        (lambda: mean_reciprocal_rank(np.zeros(0)), r"ranks: expected one per query.*found shape \(0,\)"),
        (lambda: recall_at(np.array([0, 1]), 1), "from 1 for the best; found a rank of 0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
