"""ProsQA: questions whose answer is a path in a graph of made-up classes, generated and checked.

Hao et al. 2024 (Coconut), arXiv:2412.06769, appendix A, algorithm 1. An edge is a sentence: "Every yumpus is a rompus."
or, from a person, "Tom is a yumpus." The question names a person and two classes, of which just one can be reached.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.reasoning import Sample

NAMES = ("Alex", "Anna", "Ben", "Carla", "Davis", "Eva", "Frank", "Greta", "Jack", "Lily", "Max", "Tom")
CONCEPTS = tuple(
    f"{start}{middle}pus" for start in ("br", "f", "g", "j", "l", "r", "sh", "t", "v", "w", "y", "z")
    for middle in ("im", "om", "um")
)  # fmt: skip

_FACT = re.compile(r"(?:Every (\w+)|(\w+)) is an? (\w+)\.")
_QUESTION = re.compile(r"Is (\w+) an? (\w+) or (\w+)\?")
Edge = tuple[str, str]


class Graph(NamedTuple):
    """Edges (parent, child) between numbered nodes, each from what is to what it is; and what is asked.

    Node 0 is the person of the question; target can be reached from it, neg_target cannot.
    """

    edges: list[tuple[int, int]]
    target: int
    neg_target: int


def make_graph(rng: np.random.Generator, *, num_nodes: int = 23, min_depth: int = 3) -> Graph:
    """A random graph of algorithm 1, drawn again until the target is at least min_depth edges away.

    A node's label says from which of the first two nodes it can be reached: 1, 2, both (3) or neither (0). 35 % of the
    nodes take their parents among those of label 0 or 1, 35 % of label 0 or 2, the others among all; deep nodes are
    likelier parents. A draw of no parent is drawn again: as printed, the algorithm would make it another root, 6.4 on
    average, where the released graphs have 2.5 (and 36 edges; 37 here).
    """
    least, most = min_depth + 3, len(CONCEPTS) + 2
    if not least <= num_nodes <= most:
        raise ValueError(f"num_nodes={num_nodes}: expected {least} to {most}, of which the first two are people")
    while True:
        edges, labels = _draw(rng, num_nodes)
        parents = {a for a, _ in edges}
        leaves = [node for node in range(2, num_nodes) if node not in parents]
        right = [n for n in leaves if labels[n] == 1 and _distance(edges, 0).get(n, 0) >= min_depth]
        wrong = [n for n in leaves if labels[n] == 2]
        if right and wrong:
            return Graph(edges, int(rng.choice(right)), int(rng.choice(wrong)))


def _draw(rng: np.random.Generator, num_nodes: int) -> tuple[list[tuple[int, int]], list[int]]:
    edges: list[tuple[int, int]] = []
    labels, depths = [1, 2], [0, 0]
    for node in range(2, num_nodes):
        u = rng.uniform()
        allowed = (0, 1) if u <= 0.35 else (0, 2) if u <= 0.7 else (0, 1, 2, 3)
        candidates = [n for n in range(node) if labels[n] in allowed]
        number = 0
        while not number:
            number = min(int(rng.poisson(1.5)), len(candidates))
        weight = np.array([1.5 * depths[n] + 1 for n in candidates])
        chosen = rng.choice(candidates, number, replace=False, p=weight / weight.sum())
        edges += [(int(parent), node) for parent in chosen]
        labels.append(int(np.bitwise_or.reduce([labels[p] for p in chosen])))
        depths.append(1 + min(depths[p] for p in chosen))
    return edges, labels


def _distance(edges: Sequence[tuple[Any, Any]], start: Any) -> dict[Any, int]:
    """Edges from the start to every node that can be reached."""
    found, border = {start: 0}, [start]
    while border:
        border = [b for b in dict.fromkeys(b for a in border for x, b in edges if x == a) if b not in found]
        found |= dict.fromkeys(border, max(found.values()) + 1)
    return found


def make_sample(rng: np.random.Generator, *, num_nodes: int = 23, min_depth: int = 3) -> Sample:
    """A question with its facts in random order, a shortest path as the steps, and the answer as a sentence."""
    graph = make_graph(rng, num_nodes=num_nodes, min_depth=min_depth)
    words = [str(w) for w in (*rng.permutation(NAMES)[:2], *rng.permutation(CONCEPTS)[: num_nodes - 2])]
    edges = [(words[a], words[b]) for a, b in graph.edges]
    person, right, wrong = words[0], words[graph.target], words[graph.neg_target]
    facts = [_sentence(edge) for edge in rng.permutation(edges).tolist()]
    options = rng.permutation([right, wrong])
    question = " ".join([*facts, f"Is {person} a {options[0]} or {options[1]}?"])
    steps = [_sentence(edge) for edge in shortest_path(edges, person, right)]
    return Sample(question, tuple(steps), _sentence((person, right)))


def _sentence(edge: Sequence[str]) -> str:
    start, end = edge
    return f"{start} is a {end}." if start in NAMES else f"Every {start} is a {end}."


def shortest_path(edges: Sequence[Edge], start: str, end: str) -> list[Edge]:
    """The edges of a shortest path, of several the first by the order of the edges; ValueError if there is none."""
    away = _distance([(b, a) for a, b in edges], end)
    if start not in away:
        raise ValueError(f"no path leads from {start} to {end}")
    path, node = [], start
    while node != end:
        edge = next((a, b) for a, b in edges if a == node and away.get(b, len(away)) < away[node])
        path.append(edge)
        node = edge[1]
    return path


def parse(question: str) -> tuple[list[Edge], str, tuple[str, str]]:
    """The edges, the person, and the two options of a question; ValueError for one of another form."""
    asked = _QUESTION.search(question)
    if asked is None:
        raise ValueError(f"expected 'Is Tom a lempus or scrompus?' at the end, found {question[-60:]!r}")
    edges = [(a or b, c) for a, b, c in _FACT.findall(question[: asked.start()])]
    return edges, asked[1], (asked[2], asked[3])


def solves(question: str, steps: Sequence[str], answer: str) -> bool:
    """Whether the steps are facts of the question that form a shortest path to the answer's class."""
    edges, person, options = parse(question)
    found = [_FACT.fullmatch(step.strip()) for step in [*steps, answer]]
    if not all(found):
        return False
    *path, (subject, end) = [(m[1] or m[2], m[3]) for m in found if m is not None]
    if subject != person or end not in options or not path:
        return False
    joined = path[0][0] == person and path[-1][1] == end and all(a[1] == b[0] for a, b in itertools.pairwise(path))
    return joined and set(path) <= set(edges) and len(path) == _distance(edges, person)[end]
