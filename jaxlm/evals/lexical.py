"""What words and letters alone tell of the similarity of two texts: the baseline that sentence vectors must beat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse

Terms = Callable[[str], list[str]]
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The lower-cased words, single letters and digits among them.

    >>> words("A man's 2 cats.")
    ['a', 'man', 's', '2', 'cats']
    """
    return WORD.findall(text.lower())


def characters(text: str) -> list[str]:
    """All stretches of 3 and 4 characters of the words, joined by single spaces and with one at either end.

    >>> characters("A cat!")
    [' a ', 'a c', ' ca', 'cat', 'at ', ' a c', 'a ca', ' cat', 'cat ']
    """
    joined = f" {' '.join(words(text))} "
    return [joined[i : i + n] for n in (3, 4) for i in range(len(joined) - n + 1)]


BASELINES: dict[str, Terms] = {"TF-IDF words": words, "TF-IDF characters": characters}
"""Name -> what it counts."""


def tfidf(texts: Sequence[str], terms: Terms) -> sparse.csr_matrix:
    """TF-IDF vectors at length 1, [texts, terms].

        (1 + log count) * (log((1 + n) / (1 + df)) + 1), then scaled

    n: the number of texts, df: those with the term. A text without any term is 0. scikit-learn's TfidfVectorizer with
    sublinear_tf computes the same.

    >>> x = tfidf(["a b", "a a"], words).toarray()
    >>> x.round(4).tolist()
    [[0.5797, 0.8148], [1.0, 0.0]]
    """
    counts = [Counter(terms(text)) for text in texts]
    index: dict[str, int] = {}
    for count in counts:
        for term in count:
            index.setdefault(term, len(index))
    columns = np.array([index[term] for count in counts for term in count], np.int64)
    starts = np.cumsum([0] + [len(count) for count in counts])
    tf = 1 + np.log(np.array([n for count in counts for n in count.values()], np.float64))
    df = np.bincount(columns, minlength=len(index))
    data = tf * (np.log((1 + len(texts)) / (1 + df)) + 1)[columns]
    x = sparse.csr_matrix((data, columns, starts), shape=(len(texts), len(index)))
    norms = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
    return sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ x


def lexical_cosines(first: Sequence[str], second: Sequence[str], terms: Terms) -> np.ndarray:
    """Cosine of the TF-IDF vectors of each pair, [pairs]; document frequencies are those of both sides together.

    >>> lexical_cosines(["a cat", "x"], ["a cat", "y"], words).round(4).tolist()
    [1.0, 0.0]
    """
    x = tfidf([*first, *second], terms)
    return np.asarray(x[: len(first)].multiply(x[len(first) :]).sum(axis=1)).ravel()
