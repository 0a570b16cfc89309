"""MED-SE's rows and objective against what can be said by hand, and a run on a toy ontology."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxlm.data.entities import Dictionary
from jaxlm.data.ontology import read_obo
from jaxlm.data.tokenizer_bpe import train_bpe
from jaxlm.evals import entities
from jaxlm.losses import info_nce
from jaxlm.models.config import EncoderConfig
from jaxlm.recipes import medse
from jaxlm.recipes.medse_data import (
    MedRow,
    OntologyConfig,
    defined,
    make_med_rows,
    part,
    training_rows,
    whole,
)
from jaxlm.train.config import TrainConfig
from jaxlm.train.optim import OptimConfig

ORGANS = ("lung", "liver", "skin", "bone", "heart", "brain", "kidney", "eye", "ear", "nose", "hand", "foot")
KINDS = ("cancer", "infection", "atrophy")


def write_obo(path: Path) -> None:
    """Kinds of disease, and each of them in every organ: names, a synonym, and definitions that mention the kind."""
    text = "format-version: 1.2\n"
    for k, kind in enumerate(KINDS):
        text += f'\n[Term]\nid: K:{k}\nname: {kind}\ndef: "Harm to an organ by {kind[::-1]}." []\n'
        for o, organ in enumerate(ORGANS):
            text += (
                f"\n[Term]\nid: D:{k}{o:02}\nname: {organ} {kind}\nis_a: K:{k} ! {kind}\n"
                f'def: "A {kind} that is located in the {organ} and nowhere else." []\n'
                f'synonym: "{kind} of the {organ}" EXACT []\n'
            )
    path.write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ontology")
    write_obo(folder / "toy.obo")
    tokenizer = train_bpe([(folder / "toy.obo").read_text()], vocab_size=400)
    tokenizer.save(folder / "tokenizer")
    rows = ["snomed_label_1\tsnomed_label_2\tmean_rating"]
    rows += [
        f"{a} cancer\t{b} cancer\t{3.0 if a == b else i % 3}" for i, (a, b) in enumerate(itertools.pairwise(ORGANS))
    ]
    (folder / "ehr.tsv").write_text("\n".join(rows) + "\n")
    return folder


def data_config(folder: Path, **changes) -> OntologyConfig:
    plain = dict(ontology=(str(folder / "toy.obo"),), tokenizer=str(folder / "tokenizer"), batch_size=8,
                 dev_share=0.2, test_share=0.2, epochs=20, num_threads=0)  # fmt: skip
    return OntologyConfig(**plain | changes)


@pytest.fixture(scope="module")
def rows(folder):
    ontology = read_obo(folder / "toy.obo")
    return ontology, training_rows(data_config(folder), ontology, Dictionary.of_ontology(ontology), mask="<mask>")


def test_concepts_that_are_held_out_give_neither_texts_nor_definitions(folder, rows):
    ontology, found = rows
    cfg = data_config(folder)
    parts = {name: defined(cfg, ontology, name) for name in ("train", "heldout", "test")}
    assert sorted(c for p in parts.values() for c in p) == sorted(ontology.terms) and all(parts.values())
    held_out = {ontology.terms[c].definition for name in ("heldout", "test") for c in parts[name]}
    assert {part(cfg, row.concept) for row in found} == {"train"}
    assert not any(definition in text for definition in held_out for row in found for text in row[:2])
    made = make_med_rows(cfg, found, ontology, train_bpe(["x"], vocab_size=261))
    own = [ontology.terms[row.concept].definition for row in found]
    lengths = [len(ids) for ids in made.columns["definition"].tokens]
    assert lengths == [min(len(text) + 3, cfg.definition_tokens) for text in own]  # bytes, a space before, two special


def test_a_mention_is_masked_and_reworded_and_no_concept_has_too_many(folder, rows):
    ontology, found = rows
    mentions = [row for row in found if row.text not in Dictionary.of_ontology(ontology).forms[row.concept]]
    by_concept = {c: [r for r in mentions if r.concept == c] for c in {r.concept for r in mentions}}
    assert mentions and all(len(r) <= 5 for r in by_concept.values())
    for row in mentions:
        name = ontology.terms[row.concept].name
        assert name in row.text and row.masked == row.text.replace(name, "<mask>", 1)
        assert row.reworded is None  # a kind has no synonym
    names = [row for row in found if row.concept.startswith("D")]
    assert all(row.masked == row.text and row.reworded not in (None, row.text) for row in names)


def test_related_concepts_are_no_negatives_and_the_terms_add_up(folder, rows):
    ontology, found = rows
    tokenizer = train_bpe(["x"], vocab_size=261)
    chosen = [next(r for r in found if r.concept == c) for c in sorted({r.concept for r in found})[:5]]
    chosen += [r for r in found if r.concept.startswith("K")][:1]
    made = make_med_rows(data_config(folder), chosen, ontology, tokenizer)
    batch = {name: jnp.stack([made.row(i)[name] for i in range(len(chosen))]) for name in made.row(0)}
    related = np.array([[ontology.related(a.concept, b.concept) for b in chosen] for a in chosen])
    np.testing.assert_array_equal(medse.are_related(batch["concept"], batch["ancestors"]), related)
    assert related.sum() > len(chosen)
    vectors = [jnp.asarray(v) for v in np.random.default_rng(0).normal(size=(5, len(chosen), 7))]
    cfg = medse.Config(
        run_dir="", data=data_config(folder), train=TrainConfig(num_steps=1), definition_weight=2.0, reworded_weight=0.5
    )
    values, _ = medse.objective(vectors, batch, cfg=cfg)
    x, again, masked, definition, reworded = vectors
    has = np.array([row.reworded is not None for row in chosen])

    def nce(a, b):
        return info_nce(a, b, temperature=0.05, negative_mask=~related)

    np.testing.assert_allclose(
        values, nce(x, again) + 2 * nce(masked, definition) + 0.5 * has * nce(x, reworded), rtol=1e-5
    )
    assert medse.columns_of(dataclasses.replace(cfg, definition_weight=0, reworded_weight=0)) == ("text", "text")


def test_a_row_whose_mask_is_cut_away_is_counted_and_a_lost_rewording_is_none(folder):
    tokenizer, skipped = train_bpe(["x"], vocab_size=261), Counter()
    rows = [
        MedRow("a cancer", "a <mask>", "a growth", "K:0"),
        MedRow("a very long way to a cancer", "a very long way to a <mask>", "a very long way to a growth", "K:0"),
        MedRow("a very long way to it, cancer", "a very long way to it, cancer", "a very long way to it, x", "K:0"),
    ]
    kept = whole(data_config(folder, max_tokens=16), rows, tokenizer, skipped)
    assert kept == [rows[0], rows[2]._replace(reworded=None)] and skipped == {"mention beyond max_tokens": 1}


@pytest.mark.slow
def test_a_run_learns_what_belongs_to_a_definition(folder, tmp_path):
    model = EncoderConfig(vocab_size=400, width=32, num_layers=1, num_heads=2, mlp_width=64, max_length=64)
    train = TrainConfig(num_steps=60, eval_every=20, checkpoint_every=20, best_metric="dev/mrr", best_mode="max")
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0)
    cfg = medse.Config(run_dir=str(tmp_path / "run"), data=data_config(folder), train=train, optim=optim, model=model,
                       ehr_rel=str(folder / "ehr.tsv"))  # fmt: skip
    medse.run(cfg)
    scores = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["train/definition_loss"] for line in scores if "train/definition_loss" in line]
    assert found[-1] < found[0] / 2 and {"dev/mrr", "dev/recall@1", "dev/recall@10"} <= set(scores[0])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"TF-IDF words", "TF-IDF characters", "trained"}
    assert set(results["trained"]) == set(results["TF-IDF words"]) >= {"ehr_rel/spearman", "definitions/mrr"}


def test_the_lexical_baselines_are_those_of_the_literature(shared_data):
    pairs = entities.read_ehr_rel(shared_data / "ehr_rel" / "EHR-RelB.tsv")
    assert len(pairs.first) == 3630
    found = entities.lexical_scores(entities.Definitions(["a b", "c d"], ["c d e", "a b f"]), pairs)
    assert {name: round(row["ehr_rel/spearman"], 1) for name, row in found.items()} == {
        "TF-IDF words": 23.9, "TF-IDF characters": 27.0
    }  # fmt: skip
    assert found["TF-IDF words"]["definitions/mrr"] == 50


def test_relatedness_and_retrieval_of_known_vectors(tmp_path, folder):
    pairs = entities.read_ehr_rel(folder / "ehr.tsv")
    angles = {text: i**1.5 for i, text in enumerate(sorted({*pairs.first, *pairs.second}))}

    def encode(texts):
        return np.array([[np.cos(angles[t]), np.sin(angles[t])] for t in texts])

    want = spearmanr([np.cos(angles[a] - angles[b]) for a, b in zip(pairs.first, pairs.second)], pairs.score).statistic
    assert entities.relatedness(pairs, encode) == pytest.approx(100 * want)
    known = entities.Definitions(["p", "q"], ["P", "Q"])
    vectors = {"p": [1, 0], "q": [0, 1], "P": [1, 1], "Q": [-1, 0.5]}
    found = entities.retrieval(known, lambda texts: np.array([vectors[t] for t in texts]))
    assert found == {"recall@1": 50.0, "recall@10": 100.0, "mrr": 75.0}
    (tmp_path / "bad.tsv").write_text("snomed_label_1\tsnomed_label_2\tmean_rating\nx\ty\thigh\n")
    with pytest.raises(ValueError, match=r"bad.tsv:2: expected snomed_label_1"):
        entities.read_ehr_rel(tmp_path / "bad.tsv")
    with pytest.raises(entities.MissingFiles, match="EHR-Rel"):
        entities.read_ehr_rel(tmp_path / "none.tsv")
