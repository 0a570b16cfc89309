"""Blocksworld by exhaustive enumeration: known counts, plans that are shortest, a checker that is not fooled."""

from __future__ import annotations

import itertools

import pytest

from jaxlm.data import blocksworld as bw
from jaxlm.data.reasoning import Sample


def test_the_number_of_states_is_the_known_one():
    assert [len(bw.states(n)) for n in range(1, 7)] == [1, 3, 13, 73, 501, 4051]  # OEIS A000262
    for state in bw.states(4):
        below = [b for b in state if b != bw.TABLE]
        assert len(set(below)) == len(below)  # one block at most stands on another
        for block in range(4):  # and every tower ends on the table
            seen = []
            while block != bw.TABLE:
                assert block not in seen
                seen.append(block)
                block = state[block]


def test_every_move_can_be_taken_back_and_leads_to_a_state():
    known = set(bw.states(4))
    for state in known:
        for block, onto in bw.moves(state):
            after = bw.move(state, block, onto)
            assert after in known and after != state
            assert (block, state[block]) in bw.moves(after)


def test_distances_are_those_of_brute_force():
    known = bw.states(3)
    for goal in known:
        distance = bw.distances(goal)
        assert set(distance) == set(known)
        for start in known:
            reached, length = {start}, 0
            while goal not in reached:
                reached |= {bw.move(s, *m) for s in reached for m in bw.moves(s)}
                length += 1
            assert distance[start] == length


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return bw.make_samples(4)


def test_every_pair_of_four_blocks_has_a_plan_that_replays(samples):
    assert len(samples) == 73 * 72 and len({s.question for s in samples}) == len(samples)
    for sample in samples:
        assert int(sample.answer) == len(sample.steps) >= 1
        assert bw.solves(sample.question, sample.steps)
        assert not bw.solves(sample.question, sample.steps[:-1])  # shortest: nothing less will do
    assert max(len(s.steps) for s in samples) == 6


@pytest.mark.parametrize(
    "steps",
    [
        ["Move A from the table to B"],  # B stands on A
        ["Move B from the table to C"],  # B is not on the table
        ["Move B from A to B"],
        ["Move B from A to D"],  # there is no D
        ["Move D from the table to A"],
        ["Move B from A"],
        ["", "Move B from A to C"],
    ],
)
def test_what_is_no_legal_move_is_no_solution(steps):
    question = "Start: A on the table, B on A, C on the table. Goal: A on the table, B on C, C on the table."
    assert bw.solves(question, ["Move B from A to C"])
    assert not bw.solves(question, steps)


def test_states_are_read_back_and_other_words_refused(samples):
    for num_blocks, say in itertools.product((1, 3, 4), bw.WORDINGS.values()):
        said = {say(state): state for state in bw.states(num_blocks)}
        assert len(said) == len(bw.states(num_blocks))
        assert all(bw.parse_state(words) == state for words, state in said.items())
    for words in (
        "",
        "A A",
        "A B, B C",
        "B, A",
        "A C",
        "A, C",
        "A  B",
        "A on the floor",
        "A on B, B on A",
        "A on C, B on C, C on the table",
        "A on B",
        "A on A",
    ):
        with pytest.raises(ValueError, match="expected a state such as"):
            bw.parse_state(words)
    with pytest.raises(ValueError, match="1 to 26"):
        bw.states(0)
    with pytest.raises(ValueError, match="expected at most 5"):
        bw.make_samples(6)


def test_samples_said_by_stacks_are_the_same_pairs_and_plans(samples):
    by_stacks = bw.make_samples(4, "stacks")
    assert len({sample.question for sample in by_stacks}) == 5256
    assert by_stacks[100].question == "Start: A, C D B. Goal: A D, B, C."
    for one, other in zip(samples, by_stacks, strict=True):
        ends, same = ([bw.parse_state(text) for text in s.question.removeprefix("Start: ").split(" Goal: ")]
                      for s in (one, other))  # fmt: skip
        assert ends == same and one.steps == other.steps and one.answer == other.answer
    assert bw.solves(by_stacks[100].question, by_stacks[100].steps)
    drawn, other = (bw.draw_samples(5, {"train": 9, "test": 3}, wording=wording) for wording in bw.WORDINGS)
    assert [s.steps for part in drawn.values() for s in part] == [s.steps for part in other.values() for s in part]


def test_the_parts_of_a_split_share_no_question(samples):
    parts = bw.split(samples, validation=300, test=400, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"test": 400, "validation": 300, "train": 4556}
    for a, b in itertools.combinations(parts.values(), 2):
        assert not {s.question for s in a} & {s.question for s in b}
    assert bw.split(samples, validation=300, test=400, seed=1) == parts
    assert bw.split(samples, validation=300, test=400, seed=2) != parts
    with pytest.raises(ValueError, match="together below the 5256"):
        bw.split(samples, validation=5000, test=400)


def test_drawn_samples_share_no_state_between_parts_and_have_shortest_plans():
    sizes = {"train": 60, "test": 20}
    found = bw.draw_samples(5, sizes, seed=1, starts=7)
    assert {part: len(samples) for part, samples in found.items()} == sizes
    assert len({s.question for samples in found.values() for s in samples}) == 80
    ends = {}
    for part, samples in found.items():
        texts = [t for s in samples for t in s.question.removeprefix("Start: ").split(" Goal: ")]
        ends[part] = {bw.parse_state(text) for text in texts}
        assert all(bw.solves(s.question, s.steps) and len(s.steps) == int(s.answer) >= 4 for s in samples)
    assert not ends["train"] & ends["test"]
    assert found == bw.draw_samples(5, sizes, seed=1, starts=7)
    sample = found["test"][0]
    start, goal = (bw.parse_state(t) for t in sample.question.removeprefix("Start: ").split(" Goal: "))
    assert bw.distances(goal)[start] == len(sample.steps)
    with pytest.raises(ValueError, match="train: 3 blocks give 2 samples of at least 4 moves"):
        bw.draw_samples(3, {"train": 3, "test": 3})
