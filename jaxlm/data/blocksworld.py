"""Blocksworld: arrangements of blocks, shortest plans between them, and a checker that replays a plan.

A state says on what each block stands: another block, or the table. A move puts a clear block (nothing stands on it) on
the table or on another clear block. All states and plans are found by enumeration, so every answer is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxlm.data.reasoning import Sample

TABLE = -1
MOST_BLOCKS = 5
"""Of which every pair of states can be made."""

State = tuple[int, ...]
"""For each block, the block that it stands on, or TABLE."""

_ON = re.compile(r"([A-Z]) on (?:the (table)|([A-Z]))")
_STACKS = re.compile(r"[A-Z]( [A-Z])*(, [A-Z]( [A-Z])*)*\.?")
_MOVE = re.compile(r"Move ([A-Z]) from (the table|[A-Z]) to (the table|[A-Z])")


def states(num_blocks: int) -> list[State]:
    """Every arrangement of that many blocks, sorted: 1, 3, 13, 73, 501, 4,051, 37,633, … for 1, 2, 3, … blocks.

    >>> states(2)
    [(-1, -1), (-1, 0), (1, -1)]
    """
    if not 1 <= num_blocks <= 26:
        raise ValueError(f"num_blocks: expected 1 to 26, which letters can name, found {num_blocks}")
    found: list[State] = [()]
    for _ in range(num_blocks):
        found = [larger for state in found for larger in _with_one_more(state)]
    return sorted(found)


def _with_one_more(state: State) -> Iterator[State]:
    """Every way to put another block among those of the state: each larger state comes from one smaller."""
    new = len(state)
    yield (*state, TABLE)
    for block, below in enumerate(state):
        on_top = tuple(new if under == block else under for under in state)
        yield (*on_top, block)
        if below == TABLE:
            yield (*(new if i == block else under for i, under in enumerate(state)), TABLE)


def moves(state: State) -> list[tuple[int, int]]:
    """The legal moves, each a block and where it goes, sorted; the table comes first.

    >>> moves((-1, 0))
    [(1, -1)]
    """
    clear = [block for block in range(len(state)) if block not in state]
    return [(a, b) for a in clear for b in (TABLE, *clear) if b not in (a, state[a])]


def move(state: State, block: int, onto: int) -> State:
    """The state after a legal move."""
    return tuple(onto if i == block else below for i, below in enumerate(state))


def distances(goal: State) -> dict[State, int]:
    """The least number of moves from every state to the goal: breadth-first, since every move can be taken back."""
    found, border = {goal: 0}, [goal]
    while border:
        reached = [move(state, *step) for state in border for step in moves(state)]
        border = [state for state in dict.fromkeys(reached) if state not in found]
        found |= dict.fromkeys(border, max(found.values()) + 1)
    return found


def plan(start: State, distance: Mapping[State, int]) -> list[tuple[int, int]]:
    """A shortest plan to the goal of `distances`; of several the first, by the order of `moves`."""
    steps, state = [], start
    while distance[state]:
        step = next(s for s in moves(state) if distance[move(state, *s)] < distance[state])
        steps.append(step)
        state = move(state, *step)
    return steps


def describe(state: State) -> str:
    """The state in words.

    >>> describe((-1, 0))
    'A on the table, B on A'
    """
    return ", ".join(f"{_name(block)} on {_name(below)}" for block, below in enumerate(state))


def describe_stacks(state: State) -> str:
    """The state as its stacks, each from the table up: half the words of `describe`.

    >>> describe_stacks((-1, 0, -1))
    'A B, C'
    """
    stacks = []
    for block in (block for block, below in enumerate(state) if below == TABLE):
        stack = [block]
        while stack[-1] in state:
            stack.append(state.index(stack[-1]))
        stacks.append(" ".join(map(_name, stack)))
    return ", ".join(stacks)


WORDINGS: dict[str, Callable[[State], str]] = {"blocks": describe, "stacks": describe_stacks}
"""The ways to say a state: what each block stands on, as in arXiv:2505.22202, or the stacks."""


def _name(block: int) -> str:
    return "the table" if block == TABLE else chr(ord("A") + block)


def make_sample(start: State, distance: Mapping[State, int], wording: str = "blocks") -> Sample:
    """The question for a plan between two states, a shortest plan as its steps, and the number of moves as its answer.

    >>> make_sample((-1, 0), distances((-1, -1))).steps
    ('Move B from A to the table',)
    """
    goal, say = next(state for state, moves_left in distance.items() if not moves_left), WORDINGS[wording]
    steps, state = [], start
    for block, onto in plan(start, distance):
        steps.append(f"Move {_name(block)} from {_name(state[block])} to {_name(onto)}")
        state = move(state, block, onto)
    return Sample(f"Start: {say(start)}. Goal: {say(goal)}.", tuple(steps), str(len(steps)))


def make_samples(num_blocks: int, wording: str = "blocks") -> list[Sample]:
    """Every ordered pair of different states, in a fixed order: 5,256 for four blocks, 250,500 for five.

    Six have 16 million: see `draw_samples`.
    """
    if num_blocks > MOST_BLOCKS:
        raise ValueError(f"num_blocks={num_blocks}: expected at most {MOST_BLOCKS}; of more, draw_samples")
    known = states(num_blocks)
    return [
        make_sample(start, distance, wording) for goal in known for distance in [distances(goal)] for start in known
        if start != goal
    ]  # fmt: skip


def draw_samples(
    num_blocks: int,
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    least: int = 4,
    starts: int = 25,
    wording: str = "blocks",
) -> dict[str, list[Sample]]:
    """Random pairs of states for the named parts, whose states, start and goal alike, are in no other part.

    least: moves of the shortest plans. starts: of each goal, whose distances are searched once (seven blocks: 37,633
    states, 0.4 s a goal, so about three minutes for 10,000 samples). Raises ValueError if a part has too few states.

    Source: the construction of arXiv:2505.22202, appendix E, whose generator is not released: plans of 4 to 12 moves.
    """
    rng, known = np.random.default_rng(seed), states(num_blocks)
    order, total = rng.permutation(len(known)), sum(sizes.values())
    cuts = np.cumsum([len(known) * size // total for size in sizes.values()])[:-1]
    found = {}
    for (part, size), own in zip(sizes.items(), np.split(order, cuts)):
        pairs = _draw([known[i] for i in own], size, rng, least=least, starts=starts)
        found[part] = [make_sample(start, distance, wording) for start, distance in pairs]
        if len(found[part]) < size:
            raise ValueError(
                f"{part}: {num_blocks} blocks give {len(found[part])} samples of at least {least} moves among its "
                f"{len(own)} states, expected {size}: ask for fewer, or take more blocks"
            )
    return found


def _draw(
    own: Sequence[State], size: int, rng: np.random.Generator, *, least: int, starts: int
) -> list[tuple[State, dict[State, int]]]:
    """At most `size` starts, with the distances to their goal; every state is a goal at most once."""
    found: list[tuple[State, dict[State, int]]] = []
    for goal in rng.permutation(len(own)):
        if len(found) == size:
            break
        distance = distances(own[goal])
        far = [state for state in own if distance[state] >= least]
        chosen = rng.permutation(len(far))[: min(starts, size - len(found))]
        found += [(far[i], distance) for i in chosen]
    return found


def split(samples: Sequence[Sample], *, validation: int, test: int, seed: int = 0) -> dict[str, list[Sample]]:
    """Samples as train, validation and test, by a permutation that only the seed decides.

    No question is in two parts. States are: the paper keeps those of its parts apart, which 73 states are too few for.
    """
    if min(validation, test) < 1 or validation + test >= len(samples):
        raise ValueError(
            f"validation={validation}, test={test}: expected at least 1 each, and together below the {len(samples)} "
            "samples"
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    parts = np.split(order, [test, test + validation])
    return {name: [samples[i] for i in part] for name, part in zip(("test", "validation", "train"), parts)}


def solves(question: str, steps: Sequence[str]) -> bool:
    """Whether the steps are legal moves that lead from the question's start to its goal, replayed one by one.

    >>> solves("Start: A on the table, B on A. Goal: A on the table, B on the table.", ["Move B from A to the table"])
    True
    """
    start, goal = (parse_state(text) for text in question.removeprefix("Start: ").split(" Goal: "))
    return replay(start, steps) == goal


def parse_state(text: str) -> State:
    """The state that `describe` or `describe_stacks` wrote; ValueError for words that are no state."""
    state = _from_stacks(text.rstrip(".")) if _STACKS.fullmatch(text) else _from_blocks(text)
    stood_on = [below for below in state if below != TABLE]
    stable = len(set(stood_on)) == len(stood_on) and all(_stands(state, block) for block in range(len(state)))
    if not state or not stable or text.rstrip(".") not in (describe(state), describe_stacks(state)):
        raise ValueError(f"expected a state such as 'A on the table, B on A', or 'A B', found {text!r}")
    return state


def _from_blocks(text: str) -> State:
    return tuple(TABLE if table else ord(below) - ord("A") for _, table, below in _ON.findall(text))


def _from_stacks(text: str) -> State:
    below: dict[int, int] = {}
    for stack in text.split(", "):
        blocks = [ord(name) - ord("A") for name in stack.split()]
        below |= dict(zip(blocks, (TABLE, *blocks)))
    return tuple(below.get(block, TABLE) for block in range(len(below)))


def _stands(state: State, block: int) -> bool:
    """Whether the blocks under this one end on the table."""
    for _ in state:
        if block == TABLE:
            return True
        block = state[block] if block < len(state) else block
    return block == TABLE


def replay(state: State, steps: Sequence[str]) -> State | None:
    """The state after the steps; None as soon as one is no sentence for a move, or no legal move."""
    for text in steps:
        found = _MOVE.fullmatch(text.strip())
        if found is None:
            return None
        block, source, onto = (TABLE if name == "the table" else ord(name) - ord("A") for name in found.groups())
        if block >= len(state) or state[block] != source or (block, onto) not in moves(state):
            return None
        state = move(state, block, onto)
    return state
