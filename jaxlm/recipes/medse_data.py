"""Rows for MED-SE from an ontology: a text that mentions a concept, the concept's definition, and the text reworded."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxlm.data.entities import Dictionary, Mention, mask_mention, replace_mention
from jaxlm.data.ontology import Ontology
from jaxlm.data.sentences import SentenceRows, make_column
from jaxlm.data.sources import part_of
from jaxlm.data.tokenizer_hf import HFTokenizer

COLUMNS = ("text", "masked", "reworded", "definition")


@dataclasses.dataclass(frozen=True)
class OntologyConfig:
    """What MED-SE is trained and tested on.

    ontology: OBO files of one release. tokenizer: a folder; None for that of init_from. max_tokens, definition_tokens:
    longer texts are cut there. window: words of a definition kept on either side of a mention in it. max_mentions: of
    one concept in definitions, at most so many rows; roots such as "disease" would drown the others. dev_share,
    test_share: concepts that are held out, by a stable hash of their ids. batch_size, seed, epochs, num_threads: as in
    `SentenceConfig`.
    """

    ontology: tuple[str, ...]
    tokenizer: str | None = None
    max_tokens: int = 40
    definition_tokens: int = 64
    window: int = 12
    max_mentions: int = 5
    dev_share: float = 0.1
    test_share: float = 0.1
    batch_size: int = 32
    seed: int = 0
    epochs: int = 1
    num_threads: int = 2

    def __post_init__(self) -> None:
        shares = self.dev_share, self.test_share
        if min(shares) <= 0 or sum(shares) >= 1:
            raise ValueError(f"data.dev_share, test_share: expected positive shares, together below 1; found {shares}")
        for name, least in (("window", 0), ("max_mentions", 0), ("max_tokens", 3), ("definition_tokens", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: expected at least {least}, found {getattr(self, name)}")

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is trained on."""
        return max(self.max_tokens, self.definition_tokens)


class MedRow(NamedTuple):
    """A text that mentions the concept. masked: without the mention, where something is left. reworded: with another
    form of it (None: it has no other)."""

    text: str
    masked: str
    reworded: str | None
    concept: str


def part(cfg: OntologyConfig, concept: str) -> str:
    """train, heldout (the development set) or test."""
    return part_of(concept, cfg.dev_share, cfg.test_share)


def defined(cfg: OntologyConfig, ontology: Ontology, name: str) -> list[str]:
    """The concepts of a part that have a definition, in the order of their ids."""
    terms = ontology.terms
    return sorted(c for c in terms if terms[c].definition is not None and part(cfg, c) == name)


def training_rows(cfg: OntologyConfig, ontology: Ontology, dictionary: Dictionary, *, mask: str) -> list[MedRow]:
    """Every form of every concept of the training part by itself, and its mentions in the definitions of the others.

    mask: the tokenizer's mask token. Concepts that are held out give no row, and neither do their definitions.
    """
    concepts = defined(cfg, ontology, "train")
    rng = np.random.default_rng(cfg.seed)
    rows = [row for c in concepts for row in _forms(c, dictionary, rng)]
    counts = dict.fromkeys(concepts, 0)
    for owner in concepts:
        text = ontology.terms[owner].definition or ""
        for mention in dictionary.find(text):
            if mention.concept != owner and counts.get(mention.concept, cfg.max_mentions) < cfg.max_mentions:
                counts[mention.concept] += 1
                rows.append(_mention(*cut_around(text, mention, cfg.window), dictionary, rng, mask))
    return rows


def _forms(concept: str, dictionary: Dictionary, rng: np.random.Generator) -> Iterator[MedRow]:
    for form in dictionary.forms[concept]:
        whole = Mention(0, len(form), concept)
        yield MedRow(form, form, replace_mention(form, whole, dictionary, rng), concept)


def _mention(text: str, mention: Mention, dictionary: Dictionary, rng: np.random.Generator, mask: str) -> MedRow:
    reworded = replace_mention(text, mention, dictionary, rng)
    return MedRow(text, mask_mention(text, mention, mask), reworded, mention.concept)


def cut_around(text: str, mention: Mention, words: int) -> tuple[str, Mention]:
    """The stretch of the text with that many words on either side of the mention, and the mention in it.

    >>> cut_around("one two lung cancer three four", Mention(8, 19, "D1"), 1)
    ('two lung cancer three', Mention(start=4, end=15, concept='D1'))
    """
    before, after = text[: mention.start], text[mention.end :]
    kept = " ".join(before.split(" ")[-words - 1 :])
    tail = " ".join(after.split(" ")[: words + 1])
    start = len(kept)
    return kept + text[mention.start : mention.end] + tail, mention._replace(
        start=start, end=start + mention.end - mention.start
    )


def whole(
    cfg: OntologyConfig, rows: Sequence[MedRow], tokenizer: HFTokenizer, skipped: collections.Counter[str]
) -> list[MedRow]:
    """The rows whose mask is within max_tokens; the others are counted. A rewording beyond that counts as none."""
    encode = partial(tokenizer.encode_sentences, max_tokens=cfg.max_tokens)
    masked, plain = encode([row.masked for row in rows]), encode([row.text for row in rows])
    reworded = encode([row.reworded or row.text for row in rows])
    kept = []
    for row, with_mask, text, other in zip(rows, masked, plain, reworded):
        if row.masked != row.text and tokenizer.mask_id not in with_mask:
            skipped["mention beyond max_tokens"] += 1
            continue
        kept.append(row._replace(reworded=None) if np.array_equal(text, other) else row)
    return kept


def make_med_rows(
    cfg: OntologyConfig, rows: Sequence[MedRow], ontology: Ontology, tokenizer: HFTokenizer
) -> SentenceRows:
    """The rows with the columns text, masked, reworded and definition, and as values beside them:

    concept [B] a number of the concept; ancestors [B, A] those above it, filled up with -1; has_reworded [B].
    """
    number = {concept: i for i, concept in enumerate(ontology.terms)}
    above = [sorted(number[a] for a in ontology.ancestors(row.concept)) for row in rows]
    ancestors = np.full((len(rows), max(map(len, above))), -1, np.int32)
    for i, ids in enumerate(above):
        ancestors[i, : len(ids)] = ids
    texts = {
        "text": [row.text for row in rows],
        "masked": [row.masked for row in rows],
        "reworded": [row.reworded or row.text for row in rows],
    }
    columns = {name: make_column(tokenizer, t, max_tokens=cfg.max_tokens) for name, t in texts.items()}
    length = max(column.length for column in columns.values())  # of one length, they are encoded together
    columns = {name: column._replace(length=length) for name, column in columns.items()}
    definitions = [ontology.terms[row.concept].definition or "" for row in rows]
    columns["definition"] = make_column(tokenizer, definitions, max_tokens=cfg.definition_tokens)
    extra = {
        "concept": np.array([number[row.concept] for row in rows], np.int32),
        "ancestors": ancestors,
        "has_reworded": np.array([row.reworded is not None for row in rows], np.float32),
    }
    return SentenceRows(columns, [row.concept for row in rows], tokenizer.pad_id, extra, "ontology")
