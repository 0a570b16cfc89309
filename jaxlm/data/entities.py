"""Mentions of concepts in text, by a dictionary of their names; masking a mention, or saying it in other words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.data.ontology import Ontology

_HYPHEN, _APOSTROPHE = "-‐‑–", "'’"
_PIECE = re.compile(r"\w+|\s+|[^\w\s]")
# Where a word goes on. A possessive 's is no part of the word before it: "the cancer's stage" mentions cancer.
_JOINED_BEFORE = re.compile(rf"(?<=\w)|(?<=\w[{_HYPHEN}{_APOSTROPHE}])")
_JOINED_AFTER = re.compile(rf"\w|[{_HYPHEN}]\w|[{_APOSTROPHE}](?![sS]\b)\w")
_END = ""  # the key of a trie's node for the forms that end there; no piece of a text is empty


class Mention(NamedTuple):
    """text[start:end] names the concept."""

    start: int
    end: int
    concept: str


class Dictionary:
    """Surface forms of concepts, and their mentions in texts.

    forms: concept -> its forms as written, each once, without the ambiguous ones. num_ambiguous: forms of several
    concepts that were left out.

    Upper and lower case are alike, and so are a hyphen and a space ("T cell" is "T-cell") and the kinds of apostrophe;
    a word in capitals alone is an acronym and counts as written, for ALL is a leukemia and "all" is not.

    >>> d = Dictionary({"D1": ["lung cancer", "LC"], "D2": ["cancer"], "D3": ["Crohn's disease"]})
    >>> d.find("Small-cell lung\\ncancer (LC), cancer, Crohn’s disease; pre-cancer")
    [Mention(start=11, end=22, concept='D1'), Mention(start=24, end=26, concept='D1'),
     Mention(start=29, end=35, concept='D2'), Mention(start=37, end=52, concept='D3')]
    """

    def __init__(
        self,
        forms: Mapping[str, Iterable[str]],
        *,
        ambiguous: Literal["refuse", "leave_out"] = "refuse",
        acronyms: Literal["as_written", "any_case"] = "as_written",
    ):
        """forms: concept -> its forms. acronyms: "any_case" takes "all" for ALL, too.

        Raises ValueError for a form without letters or digits, and for one of several concepts unless ambiguous is
        "leave_out".
        """
        claims: dict[_Key, dict[str, str]] = {}  # what a form is known by -> concept -> the form as written
        for concept, texts in forms.items():
            for text in texts:
                claims.setdefault(_key(text, concept, acronyms), {}).setdefault(concept, text)
        several = {key: found for key, found in claims.items() if len(found) > 1}
        if several and ambiguous == "refuse":
            found = next(iter(several.values()))
            raise ValueError(
                f"{len(several)} forms name several concepts, as {next(iter(found.values()))!r} does "
                f"{' and '.join(found)}: mend them, or set ambiguous='leave_out' to do without such forms"
            )
        self.num_ambiguous = len(several)
        own: dict[str, list[str]] = {concept: [] for concept in forms}
        self._keys: dict[str, list[_Key]] = {concept: [] for concept in forms}
        self._trie: dict[str, Any] = {}
        for key, found in claims.items():
            if key not in several:
                ((concept, text),) = found.items()
                own[concept].append(text)
                self._keys[concept].append(key)
                self._insert(key, concept)
        self.forms = {concept: tuple(texts) for concept, texts in own.items()}

    @classmethod
    def of_ontology(
        cls,
        ontology: Ontology,
        *,
        ambiguous: Literal["refuse", "leave_out"] = "refuse",
        acronyms: Literal["as_written", "any_case"] = "as_written",
    ) -> Dictionary:
        """Names and EXACT synonyms of all terms; the other scopes name something wider, narrower or merely near."""
        forms = {id: (term.name, *term.exact) for id, term in ontology.terms.items()}
        return cls(forms, ambiguous=ambiguous, acronyms=acronyms)

    def _insert(self, key: _Key, concept: str) -> None:
        node = self._trie
        for piece in key.pieces:
            node = node.setdefault(piece, {})
        node.setdefault(_END, {})[key.written] = concept

    def find(self, text: str) -> list[Mention]:
        """All mentions from left to right, none overlapping another: of those that begin first, the longest.

        A mention is made of whole words: it neither begins nor ends inside a word, nor inside one that is joined by
        hyphens or apostrophes ("cancer-free" and "non-cancer" do not mention cancer). The time is linear in the text,
        times at most the pieces of the longest form.
        """
        pieces = [(m.start(), m.end(), _fold(m[0])) for m in _PIECE.finditer(text)]
        mentions, i = list[Mention](), 0
        while i < len(pieces):
            found = self._longest(text, pieces, i)
            if found is None:
                i += 1
            else:
                stop, mention = found
                mentions.append(mention)
                i = stop
        return mentions

    def _longest(self, text: str, pieces: list[tuple[int, int, str]], first: int) -> tuple[int, Mention] | None:
        """(the piece after it, the longest mention that begins with this piece)."""
        start, longest = pieces[first][0], None
        node: dict[str, Any] | None = self._trie
        if pieces[first][2] not in self._trie or _JOINED_BEFORE.match(text, start):
            return None
        for i in range(first, len(pieces)):
            _, end, piece = pieces[i]
            node = node.get(piece)
            if node is None:
                break
            ends = node.get(_END, {})
            concept = ends.get(text[start:end], ends.get(None))
            if concept is not None and not _JOINED_AFTER.match(text, end):
                longest = i + 1, Mention(start, end, concept)
        return longest

    def other_forms(self, concept: str, text: str) -> tuple[str, ...]:
        """The concept's forms but for those that are the text itself, up to case, hyphens and apostrophes.

        Raises ValueError for an unknown concept.
        """
        if concept not in self.forms:
            raise ValueError(f"no concept {concept!r} among the {len(self.forms):,} of the dictionary")
        pieces = _pieces(text)
        return tuple(f for f, key in zip(self.forms[concept], self._keys[concept]) if key.pieces != pieces)


def mask_mention(text: str, mention: Mention, mask: str) -> str:
    """The text with the mask (a tokenizer's "[MASK]") in place of the mention, and all else as it was.

    Raises ValueError for a mention outside the text.

    >>> mask_mention("A lung cancer grew.", Mention(2, 13, "D1"), "[MASK]")
    'A [MASK] grew.'
    """
    before, _, after = _split(text, mention)
    return before + mask + after


def replace_mention(text: str, mention: Mention, dictionary: Dictionary, rng: np.random.Generator) -> str | None:
    """The text with another form of the same concept in place of the mention, each equally likely; all else as it was.

    None if the concept has no other form. Raises ValueError for a mention outside the text.

    >>> d = Dictionary({"D1": ["lung cancer", "Lung Cancer", "carcinoma of the lung"]})
    >>> replace_mention("A LUNG CANCER grew.", Mention(2, 13, "D1"), d, np.random.default_rng(0))
    'A carcinoma of the lung grew.'
    """
    before, written, after = _split(text, mention)
    others = dictionary.other_forms(mention.concept, written)
    return before + others[rng.integers(len(others))] + after if others else None


def _split(text: str, mention: Mention) -> tuple[str, str, str]:
    start, end, _ = mention
    if not 0 <= start < end <= len(text):
        raise ValueError(f"{mention} is not within the {len(text)} characters of the text: find it in this very text")
    return text[:start], text[start:end], text[end:]


class _Key(NamedTuple):
    """What a form is known by. written: of an acronym, the only way to write it."""

    pieces: tuple[str, ...]
    written: str | None


def _key(form: str, concept: str, acronyms: str) -> _Key:
    form = form.strip()
    if not re.search(r"\w", form):
        raise ValueError(f"{concept}: expected a surface form with letters or digits, found {form!r}")
    as_written = acronyms == "as_written" and form.isalpha() and form.isupper()
    return _Key(_pieces(form), form if as_written else None)


def _pieces(text: str) -> tuple[str, ...]:
    return tuple(_fold(piece) for piece in _PIECE.findall(text))


def _fold(piece: str) -> str:
    """The piece by which alike ones are found."""
    if piece.isspace() or piece in _HYPHEN:
        return " "
    return "'" if piece in _APOSTROPHE else piece.casefold()
