"""Mentions against a brute-force search, the fine print of words, and the dictionary of the real Disease Ontology."""

from __future__ import annotations

import re

import numpy as np
import pytest

from jaxlm.data.entities import Dictionary, Mention, mask_mention, replace_mention
from jaxlm.data.ontology import Ontology, Term, read_obo

FORMS = {"1": ["a", "a b", "a b c d", "AB"], "2": ["b", "c d", "b-c", "a's b"], "3": ["c (d)", "d e/f", "(e)"]}


def brute_force(text):
    """All pairs of ends, each tried as a whole: the longest mention at each place from the left."""
    inside = re.compile(r"(?<=\w)(?=\w)|(?<=\w[-'])(?=\w)|(?<=\w)(?=-\w)|(?<=\w)(?='(?!s\b)\w)")
    known = {f if f == "AB" else f.replace("-", " "): concept for concept, forms in FORMS.items() for f in forms}
    found, start = [], 0
    while start < len(text):
        for end in range(len(text), start, -1):
            inner = text[start:end]
            form = inner if inner in known else re.sub(r"\s+|-", " ", inner.lower())
            edges = [m.start() for m in inside.finditer(text)]
            if form in known and inner == inner.strip(" ") and start not in edges and end not in edges:
                found.append(Mention(start, end, known[form]))
                start = end - 1
                break
        start += 1
    return found


def test_mentions_are_those_of_a_brute_force_search():
    rng = np.random.default_rng(0)
    dictionary, total = Dictionary(FORMS), 0
    words = ["a", "b", "c", "d", "e", "f", "A", "AB", "x"]
    joints = [" ", " ", " ", "  ", "-", "'", "'s ", "/", " (", ") ", "", ","]
    for _ in range(400):
        text = "".join(rng.choice(words) + rng.choice(joints) for _ in range(rng.integers(1, 9)))
        found = dictionary.find(text)
        assert found == brute_force(text), text
        total += len(found)
    assert total > 400


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("Cancer, CANCER and cancers", ["Cancer", "CANCER"]),
        ("cancer-free, non-cancer, cancer- and lung-cancer", ["cancer", "lung-cancer"]),
        ("the cancer's stage, lung cancer’s end, 'cancer'", ["cancer", "lung cancer", "cancer"]),
        ("cancer'd o'cancer cancer_1 1cancer", []),
        ("Crohn’s disease, crohn's\n disease, Crohns disease", ["Crohn’s disease", "crohn's\n disease"]),
        ("T-cell lymphoma, t cell lymphoma, T – cell lymphoma", ["T-cell lymphoma", "t cell lymphoma"]),
        ("all ALL All", ["ALL"]),
        ("lung cancer of lung", ["lung cancer"]),
        ("covid-19 and COVID-19", ["covid-19", "COVID-19"]),
        ("", []),
    ],
)
def test_words_hyphens_apostrophes_and_acronyms(text, mentions):
    forms = ["cancer", "lung cancer", "lung cancer of skin", "Crohn's disease", "T-cell lymphoma", "ALL", "COVID-19"]
    found = Dictionary({"1": forms}).find(text)
    assert [text[m.start : m.end] for m in found] == mentions


def test_ambiguous_forms_are_refused_or_left_out():
    forms = {"1": ["x-linked a", "ALD", "a"], "2": ["X linked A", "ald"], "3": ["a"], "4": []}
    with pytest.raises(ValueError, match="2 forms name several concepts, as 'x-linked a' does 1 and 2: mend them, or"):
        Dictionary(forms)
    dictionary = Dictionary(forms, ambiguous="leave_out")
    assert dictionary.num_ambiguous == 2
    assert dictionary.forms == {"1": ("ALD",), "2": ("ald",), "3": (), "4": ()}
    assert [m.concept for m in dictionary.find("ALD ald a X-linked A")] == ["1", "2"]
    assert Dictionary(forms, ambiguous="leave_out", acronyms="any_case").num_ambiguous == 3
    with pytest.raises(ValueError, match="1: expected a surface form with letters or digits, found '-'"):
        Dictionary({"1": [" - "]})


def test_names_and_exact_synonyms_of_an_ontology():
    term = Term("1", "heart attack", exact=("myocardial infarction",), other={"BROAD": ("heart disease",)})
    dictionary = Dictionary.of_ontology(Ontology({"1": term}))
    assert dictionary.forms == {"1": ("heart attack", "myocardial infarction")}
    assert dictionary.find("heart disease") == []


def test_masking_and_replacing_leave_the_rest_alone():
    dictionary = Dictionary({"1": ["heart attack", "Heart-attack", "MI", "infarction"], "2": ["flu"]})
    text = " Naïve\t heart  attack,\n the flu "
    attack, flu = dictionary.find(text)
    assert mask_mention(text, attack, "[MASK]") == " Naïve\t [MASK],\n the flu "
    rng, seen = np.random.default_rng(0), []
    for _ in range(60):
        seen.append(replace_mention(text, attack, dictionary, rng))
    assert set(seen) == {" Naïve\t MI,\n the flu ", " Naïve\t infarction,\n the flu "}
    assert 15 < seen.count(seen[0]) < 45
    again = np.random.default_rng(0)
    assert [replace_mention(text, attack, dictionary, again) for _ in range(60)] == seen
    assert replace_mention(text, flu, dictionary, rng) is None
    for bad in (Mention(3, 3, "1"), Mention(-1, 2, "1"), Mention(0, 99, "1")):
        with pytest.raises(ValueError, match="is not within the 32 characters of the text"):
            mask_mention(text, bad, "")
        with pytest.raises(ValueError, match="is not within"):
            replace_mention(text, bad, dictionary, rng)
    with pytest.raises(ValueError, match="no concept '3' among the 2 of the dictionary"):
        replace_mention(text, Mention(0, 2, "3"), dictionary, rng)


def test_the_disease_ontology(shared_data):
    ontology = read_obo(sorted((shared_data / "disease_ontology").glob("*.obo")))
    dictionary = Dictionary.of_ontology(ontology, ambiguous="leave_out")
    for concept, forms in dictionary.forms.items():  # every form is found, as itself
        for form in forms:
            assert dictionary.find(form) == [Mention(0, len(form), concept)]
    definitions = {id: t.definition for id, t in ontology.terms.items() if t.definition is not None}
    found = {id: dictionary.find(text) for id, text in definitions.items()}
    giveaways = sum(any(m.concept == id for m in mentions) for id, mentions in found.items())
    counts = len(ontology.terms), sum(map(len, dictionary.forms.values())), dictionary.num_ambiguous
    assert (*counts, sum(map(len, found.values())), giveaways) == (1264, 3359, 1, 1167, 62)
