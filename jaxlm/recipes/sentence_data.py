"""Tasks of `sentence_by_sentence`: samples in three parts, their tokenizer and rows, and how answers are judged."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxlm.data import blocksworld, prosqa
from jaxlm.data.errors import BadRow
from jaxlm.data.loader import Loader
from jaxlm.data.reasoning import ANSWER_MARK, Sample, gsm8k, make_sample_rows, sample_of
from jaxlm.data.sentences import SentenceRows, Sentences
from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.data.tokenizer_train import train_sentencepiece

PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is asked, and how it is cut into tokens.

    task: blocksworld and prosqa are generated, with exact checkers; gsm8k and jsonl ({question, steps, answer}) are
    read from the sources train, validation and test. num_blocks: of blocksworld, all of whose pairs of states are used;
    with more than five, pairs are drawn. wording: of its states, what each block stands on, or "stacks", each from the
    table up, which takes half the words. num_samples: in train, of prosqa and of drawn pairs. num_nodes: of prosqa.
    num_validation, num_test: of a generated task. tokenizer: a folder or file, or "sentencepiece:SIZE" to train one of
    that size on the training samples. max_steps (the answer's sentence counts), max_step_tokens, max_question_tokens:
    samples beyond are left out whole and counted. bad_rows: as in `DataConfig`.
    """

    task: Literal["blocksworld", "prosqa", "gsm8k", "jsonl"]
    tokenizer: str
    num_blocks: int = 4
    wording: Literal["blocks", "stacks"] = "blocks"
    num_samples: int = 5000
    num_nodes: int = 10
    num_validation: int = 200
    num_test: int = 400
    train: SourceConfig | None = None
    validation: SourceConfig | None = None
    test: SourceConfig | None = None
    max_steps: int = 8
    max_step_tokens: int = 16
    max_question_tokens: int = 64
    batch_size: int = 32
    bad_rows: Literal["refuse", "skip"] = "refuse"
    seed: int = 0
    num_threads: int = 2

    def __post_init__(self) -> None:
        read = self.task in ("gsm8k", "jsonl")
        given = [name for name in PARTS if getattr(self, name) is not None]
        if len(given) != (3 if read else 0):
            expected = "train, validation and test" if read else "no sources, since it is generated"
            raise ValueError(f"data.task={self.task!r}: expected {expected}; found {given or 'none'}")


class Task(NamedTuple):
    """A task ready to train on. rows: of each part; solved: whether steps and answer are right (None: no checker)."""

    tokenizer: Tokenizer
    samples: dict[str, list[Sample]]
    rows: dict[str, SentenceRows]
    skipped: collections.Counter[str]
    solved: Callable[[Sample, Sequence[str], str], bool] | None


def make_task(cfg: TaskConfig, folder: Path) -> Task:
    """Generates or reads the samples, and makes their rows; the tokenizer is kept in the folder."""
    skipped: collections.Counter[str] = collections.Counter()
    samples = make_samples(cfg, skipped)
    tokenizer = _tokenizer(cfg, samples["train"], folder)
    tokenizer.save(folder)
    rows = {}
    for part, found in samples.items():
        rows[part], left_out = sample_rows(cfg, found, tokenizer, part)
        skipped[f"too long in {part}"] += left_out
    samples = {part: [found[i] for i in _kept(rows[part])] for part, found in samples.items()}
    return Task(tokenizer, samples, rows, +skipped, SOLVED.get(cfg.task))


def sample_rows(
    cfg: TaskConfig, samples: Sequence[Sample], tokenizer: Tokenizer, part: str
) -> tuple[SentenceRows, int]:
    """The rows of samples under the limits of the config."""
    return make_sample_rows(
        samples, tokenizer, origin=part, max_steps=cfg.max_steps, max_step_tokens=cfg.max_step_tokens,
        max_question_tokens=cfg.max_question_tokens,
    )  # fmt: skip


def _kept(rows: SentenceRows) -> list[int]:
    return [int(origin.rpartition(":")[2]) for origin in rows.origin]


def make_samples(cfg: TaskConfig, skipped: collections.Counter[str]) -> dict[str, list[Sample]]:
    """The samples of every part; those of blocksworld are all that there are. skipped: counts bad rows, by reason."""
    sizes = dict(zip(PARTS, (cfg.num_samples, cfg.num_validation, cfg.num_test)))
    if cfg.task == "blocksworld" and cfg.num_blocks > blocksworld.MOST_BLOCKS:
        return blocksworld.draw_samples(cfg.num_blocks, sizes, seed=cfg.seed, wording=cfg.wording)
    if cfg.task == "blocksworld":
        every = blocksworld.make_samples(cfg.num_blocks, cfg.wording)
        return blocksworld.split(every, validation=cfg.num_validation, test=cfg.num_test, seed=cfg.seed)
    if cfg.task == "prosqa":
        rng = np.random.default_rng(cfg.seed)
        return {
            part: [prosqa.make_sample(rng, num_nodes=cfg.num_nodes) for _ in range(size)]
            for part, size in sizes.items()
        }
    return {part: list(_read(cfg, getattr(cfg, part), skipped)) for part in PARTS}


def _read(cfg: TaskConfig, source: SourceConfig, skipped: collections.Counter[str]) -> Iterator[Sample]:
    rows, make = open_source(source), gsm8k if cfg.task == "gsm8k" else sample_of
    for i in range(len(rows)):
        try:
            yield make(rows[i], rows.origin(i))
        except BadRow as error:
            if cfg.bad_rows == "refuse":
                raise
            skipped[error.reason] += 1


def _tokenizer(cfg: TaskConfig, samples: Sequence[Sample], folder: Path) -> Tokenizer:
    kind, _, size = cfg.tokenizer.partition(":")
    if kind != "sentencepiece":
        return load_tokenizer(cfg.tokenizer)
    if not size.isdigit():
        raise ValueError(f"data.tokenizer={cfg.tokenizer!r}: expected 'sentencepiece:SIZE', such as sentencepiece:384")
    texts = ("\n".join([sample.question, *sample.sentences]) for sample in samples)
    model = train_sentencepiece(texts, vocab_size=int(size), num_threads=1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    return load_tokenizer(folder)


def _solves_blocksworld(sample: Sample, steps: Sequence[str], answer: str) -> bool:
    return answer == sample.answer and len(steps) == int(answer) and blocksworld.solves(sample.question, steps)


def _solves_prosqa(sample: Sample, steps: Sequence[str], answer: str) -> bool:
    return answer == sample.answer and prosqa.solves(sample.question, steps, answer)


SOLVED: dict[str, Callable[[Sample, Sequence[str], str], bool]] = {
    "blocksworld": _solves_blocksworld,
    "prosqa": _solves_prosqa,
}


def answers(texts: Sequence[str]) -> tuple[list[str], str | None]:
    """The steps before the first sentence of an answer, and that answer; None where there is none.

    >>> answers(["Move A from B to the table", "### 1", "more"])
    (['Move A from B to the table'], '1')
    """
    for i, text in enumerate(texts):
        if text.startswith(ANSWER_MARK):
            return list(texts[:i]), text.removeprefix(ANSWER_MARK).strip()
    return list(texts), None


def last_answer(texts: Sequence[str]) -> tuple[list[str], str | None]:
    """The steps, and the answer that the last sentence gives; None where it gives none.

    >>> last_answer(["### 1", "### 2"]), last_answer(["### 1", "Move A from B to the table"])[1]
    ((['### 1'], '2'), None)
    """
    return list(texts[:-1]), answers(texts[-1:])[1]


def judge(
    task: Task, samples: Sequence[Sample], found: Sequence[Sequence[str]], *, last: bool = False
) -> dict[str, float]:
    """Shares in percent: accuracy of the answers, and solved, whose steps are right too (tasks with a checker).

    last: the answer is that of the last sentence, not of the first that gives one.
    """
    read = [(last_answer if last else answers)(texts) for texts in found]
    right = [answer == sample.answer for sample, (_, answer) in zip(samples, read, strict=True)]
    scores = {"accuracy": 100 * float(np.mean(right))}
    if task.solved is not None:
        solved = [a is not None and task.solved(s, steps, a) for s, (steps, a) in zip(samples, read)]
        scores["solved"] = 100 * float(np.mean(solved))
    return scores


def make_batches(
    cfg: TaskConfig, rows: SentenceRows, task: Task, *, num_steps: int, vectors: Mapping[str, np.ndarray] = {}
) -> Sentences:
    """The rows in shuffled batches, as often as num_steps needs them, no wider than the longest of them.

    vectors: of frozen encoders, [rows, M, E], fields of the batches beside the others.
    """
    epochs, narrow = -(-num_steps * cfg.batch_size // len(rows.plan)) + 1, fitted(rows)
    given = dataclasses.replace(narrow, extra={**narrow.extra, **vectors})
    loader = Loader(
        [(given, 1.0, epochs)], batch_size=cfg.batch_size, seed=cfg.seed, process_index=jax.process_index(),
        process_count=jax.process_count(),
    )  # fmt: skip
    return Sentences(loader, task.skipped, rows.fingerprint())  # of vectors, by the parameters that they come from


def most_sentences(batches: Sentences, num_steps: int) -> int:
    """The most sentences that any of the batches has."""
    loader = batches.train
    counts = (loader.sources[0].extra["step_segments"][..., 0] != 0).sum(axis=1)
    order = [loader.mixture.locate(r)[1] for r in range(num_steps * loader.batch_size)]
    return int(counts[order].reshape(num_steps, -1).sum(axis=1).max())


def fitted(rows: SentenceRows) -> SentenceRows:
    """The rows with as many places for sentences and tokens as the longest of them fill: the limits of a config may be
    far above, and every place costs its share of a step."""
    segments = rows.extra["step_segments"]
    sentences = int((segments[..., 0] != 0).sum(axis=1).max())
    tokens = int((segments != 0).sum(axis=2).max())
    steps = {name: rows.extra[name][:, :sentences, :tokens] for name in ("steps", "step_segments")}
    return dataclasses.replace(rows, extra={"ends": rows.extra["ends"][:, : sentences + 1], **steps})
