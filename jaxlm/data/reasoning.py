"""Questions, the sentences that lead to their answers, and the rows that a model of sentences is trained on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data.encode import text_of
from jaxlm.data.errors import BadRow
from jaxlm.data.sentences import LENGTH_STEP, Column, SentenceRows
from jaxlm.data.tokenizer import Tokenizer

ANSWER_MARK = "### "
"""What the sentence of the answer begins with."""

EQUATION = re.compile(r"<<([^<>]*)>>")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question, its reasoning a sentence each, and its answer. No part holds a newline: that is where sentences end.

    >>> Sample("Two and three?", ("2 + 3 = 5",), "5").sentences
    ('2 + 3 = 5', '### 5')
    """

    question: str
    steps: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        for name, text in (("question", self.question), ("answer", self.answer), *(("a step", s) for s in self.steps)):
            if not text.strip():
                raise ValueError(f"{name} is empty: expected a text")
            if "\n" in text:
                raise ValueError(f"{name} holds a newline, which ends a sentence: expected one line, found {text!r}")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The steps and the answer, as a model writes them."""
        return *self.steps, f"{ANSWER_MARK}{self.answer}"


def sample_of(row: Mapping[str, Any], origin: str) -> Sample:
    """A row {question: text, steps: [text, …], answer: text} as a sample.

    Published files of CommonsenseQA have the answer's sentence as their last step too: it is one sentence here.
    """
    question, answer = (text_of(row, origin, field=field) for field in ("question", "answer"))
    steps = row.get("steps")
    if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
        raise BadRow(origin, "no steps", f"expected a list of texts in 'steps', found {steps!r:.80}")
    if steps and steps[-1] == f"{ANSWER_MARK}{answer}":
        steps = steps[:-1]
    return _sample(question, tuple(steps), answer, origin)


def _sample(question: str, steps: tuple[str, ...], answer: str, origin: str) -> Sample:
    try:
        return Sample(question, steps, answer)
    except ValueError as error:
        raise BadRow(origin, "no sentences", str(error)) from error


def gsm8k(row: Mapping[str, Any], origin: str) -> Sample:
    """A row of GSM8K with the equations of its worked solution as the steps.

    >>> gsm8k({"question": "Two and three?", "answer": "It is 2+3 = <<2+3=5>>5.\\n#### 5"}, "row 0").steps
    ('<<2+3=5>>',)
    """
    question, solution = (text_of(row, origin, field=field) for field in ("question", "answer"))
    worked, mark, answer = solution.rpartition("#### ")
    if not mark:
        raise BadRow(origin, "no answer", f"expected '#### <number>' at the end, found {solution[-40:]!r}")
    steps = tuple(f"<<{equation}>>" for equation in EQUATION.findall(worked))
    return _sample(" ".join(question.split()), steps, answer.strip().replace(",", ""), origin)


def multiple_choice(question: str, choices: Sequence[str]) -> str:
    """A question with its lettered choices on one line, as the paper writes CommonsenseQA.

    >>> multiple_choice("Where is a book?", ["shelf", "sea"])
    'Where is a book?\\tA: shelf\\tB: sea'
    """
    return "\t".join([question, *(f"{chr(ord('A') + i)}: {choice}" for i, choice in enumerate(choices))])


def newline_id(tokenizer: Tokenizer) -> int:
    """The token that ends a sentence; ValueError if a newline is more than one."""
    ids = tokenizer.encode_plain("\n")
    if len(ids) != 1:
        raise ValueError(f"a newline must be one token, since sentences are read there; the tokenizer has {len(ids)}")
    return int(ids[0])


def make_sample_rows(
    samples: Iterable[Sample], tokenizer: Tokenizer, *, origin: str, max_steps: int, max_step_tokens: int,
    max_question_tokens: int,
) -> tuple[SentenceRows, int]:  # fmt: skip
    """The samples as rows, and how many were left out because a part of them is longer than its maximum.

    A row's origin is `<origin>:<index of the sample>`. Every sentence ends in the newline token. A row holds

        question/tokens, question/segments    [Tq]      the question and its newline
        text/tokens, text/segments            [T]       the question and all sentences, one after another
        ends                                  [M + 1]   places of the newlines in `text`: that of the question, then of
                                                        the sentences; the last one repeated where there are fewer
        steps, step_segments                  [M, S]    the sentences by themselves; 0 segments are padding

    M, S: max_steps (the answer's sentence counts) and max_step_tokens. A sample is left out whole, never cut: cut, it
    would lose its answer.
    """
    end = np.array([newline_id(tokenizer)], np.int32)
    kept: list[tuple[np.ndarray, list[np.ndarray]]] = []
    places: list[str] = []
    left_out = 0
    for i, sample in enumerate(samples):
        question = np.concatenate([tokenizer.encode_plain(sample.question), end])
        steps = [np.concatenate([tokenizer.encode_plain(text), end]) for text in sample.sentences]
        too_long = len(question) > max_question_tokens or max(map(len, steps)) > max_step_tokens
        if too_long or len(steps) > max_steps:
            left_out += 1
        else:
            kept.append((question, steps))
            places.append(f"{origin}:{i}")
    if not kept:
        if not left_out:
            raise ValueError(f"{origin}: there is no sample")
        raise ValueError(
            f"{origin}: all {left_out} samples are longer than max_steps={max_steps}, max_step_tokens="
            f"{max_step_tokens}, max_question_tokens={max_question_tokens}: raise them"
        )
    columns = {
        "question": _column([question for question, _ in kept]),
        "text": _column([np.concatenate([question, *steps]) for question, steps in kept]),
    }
    ends = np.zeros((len(kept), max_steps + 1), np.int32)
    tokens = np.full((len(kept), max_steps, max_step_tokens), tokenizer.pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for i, (question, steps) in enumerate(kept):
        found = np.cumsum([len(question), *map(len, steps)]) - 1
        ends[i] = np.pad(found, (0, max_steps + 1 - len(found)), mode="edge")
        for j, step in enumerate(steps):
            tokens[i, j, : len(step)], segments[i, j, : len(step)] = step, 1
    extra = {"ends": ends, "steps": tokens, "step_segments": segments}
    return SentenceRows(columns, places, tokenizer.pad_id, extra, origin), left_out


def _column(tokens: list[np.ndarray]) -> Column:
    return Column(tokens, -(-max(map(len, tokens)) // LENGTH_STEP) * LENGTH_STEP)
