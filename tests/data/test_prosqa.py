"""ProsQA: generated questions are what the released ones are, and the checker agrees with their gold steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxlm.data import prosqa
from jaxlm.data.reasoning import sample_of


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return [prosqa.make_sample(rng) for _ in range(200)]


def test_generated_questions_have_one_right_option_and_a_shortest_path(samples):
    assert len({s.question for s in samples}) == len(samples)
    first = 0
    for sample in samples:
        edges, person, options = prosqa.parse(sample.question)
        reached = prosqa._distance(edges, person)
        right = sample.answer.removesuffix(".").split()[-1]
        (wrong,) = set(options) - {right}
        assert right in reached and wrong not in reached and reached[right] == len(sample.steps) >= 3
        assert prosqa.solves(sample.question, sample.steps, sample.answer)
        first += options[0] == right
    assert 70 < first < 130  # the options are shuffled: 100 +- 7


def test_their_size_is_that_of_the_released_files(samples):
    # The released files have 22.8 nodes and 36.3 edges on average; these have 23 nodes.
    edges = [len(prosqa.parse(s.question)[0]) for s in samples]
    assert np.mean(edges) == pytest.approx(37, abs=1)
    assert {len(s.steps) for s in samples} <= {3, 4, 5, 6, 7, 8}


def test_released_gold_steps_are_solutions(shared_data):
    rows = json.loads((shared_data / "prosqa" / "prosqa_valid.json").read_text())
    assert len(rows) == 300
    for i, row in enumerate(rows):
        sample = sample_of(row, f"valid:{i}")
        assert prosqa.solves(sample.question, sample.steps, sample.answer)
        edges, person, _ = prosqa.parse(sample.question)
        assert len(edges) == len(row["edges"]) and person == row["idx_to_symbol"][row["root"]]
        assert row["idx_to_symbol"][row["neg_target"]] not in prosqa._distance(edges, person)


QUESTION = "Tom is a terpus. Every terpus is a lempus. Every terpus is a gimpus. Every gimpus is a lempus. "
QUESTION += "Every wumpus is a rompus. Is Tom a lempus or rompus?"
STEPS = ["Tom is a terpus.", "Every terpus is a lempus."]


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        (STEPS, "Tom is a rompus."),  # the other option
        (STEPS, "Max is a lempus."),
        (STEPS[:1], "Tom is a lempus."),  # ends too early
        (["Tom is a terpus.", "Every terpus is a gimpus.", "Every gimpus is a lempus."], "Tom is a lempus."),  # longer
        (["Tom is a wumpus.", "Every wumpus is a lempus."], "Tom is a lempus."),  # no facts
        (STEPS[1:], "Tom is a lempus."),
        ([*STEPS[:1], "nonsense"], "Tom is a lempus."),
        ([], "Tom is a lempus."),
    ],
)
def test_what_is_no_shortest_path_of_facts_is_no_solution(steps, answer):
    assert prosqa.solves(QUESTION, STEPS, "Tom is a lempus.")
    assert not prosqa.solves(QUESTION, steps, answer)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="expected 'Is Tom a lempus or scrompus"):
        prosqa.parse("Tom is a terpus.")
    with pytest.raises(ValueError, match="num_nodes=4: expected 6 to 38"):
        prosqa.make_graph(np.random.default_rng(0), num_nodes=4)
