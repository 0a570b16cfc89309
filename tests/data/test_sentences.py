"""Rows of sentences: what is read, what is left out, the shapes of a batch, and the tokenizer trained on them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from jaxlm.data.errors import BadRow
from jaxlm.data.sentences import SentenceConfig, make_rows, make_sentences, read_examples, sentence_tokenizer
from jaxlm.data.sources import SourceConfig
from jaxlm.data.tokenizer import HFTokenizer
from jaxlm.data.tokenizer_bpe import train_bpe

PAIRS = (
    {"a": "A cat sits.", "b": " A dog runs. ", "score": "4.5"},
    {"a": "A dog runs.", "b": "Birds sing in the old tree.", "score": 1},
    {"a": "A cat sits.", "b": "It rains.", "score": "0"},
)


def config(rows=PAIRS, **changes) -> SentenceConfig:
    return SentenceConfig(train=(SourceConfig("memory", rows=rows),), fields=("a", "b"), **changes)


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return train_bpe([row[field] for row in PAIRS for field in ("a", "b")], vocab_size=300)


def test_sentences_are_read_once_and_those_of_an_evaluation_never():
    skipped: Counter[str] = Counter()
    found = read_examples(config(), skipped, exclude={"It rains."})
    assert [e.texts for e in found] == [("A cat sits.",), ("A dog runs.",), ("Birds sing in the old tree.",)]
    assert skipped == {"repeated": 2, "of an evaluation": 1}
    with pytest.raises(ValueError, match="no row is left to train on; left out"):
        read_examples(config(), Counter(), exclude={t.strip() for row in PAIRS for t in (row["a"], row["b"])})


def test_tuples_keep_their_texts_and_score_together(tokenizer):
    cfg = config(examples="tuples", score_field="score", max_tokens=9)
    rows = make_rows(cfg, read_examples(cfg, Counter()), tokenizer)
    row = rows.row(1)
    assert row["score"] == np.float32(1) and set(rows.columns) == {"a", "b"}
    assert row["a/tokens"].shape == (8,) and row["b/tokens"].shape == (16,)  # a length of each column's own
    assert row["b/segments"].sum() == 9  # the longest text is cut
    ids = row["a/tokens"][row["a/segments"] != 0]
    assert tokenizer.decode(ids).strip() == "a dog runs."
    assert (row["a/tokens"][row["a/segments"] == 0] == tokenizer.pad_id).all()


def test_a_batch_is_a_function_of_the_step_and_hosts_take_slices(tokenizer):
    cfg = config(epochs=4, batch_size=4)
    rows = make_rows(cfg, read_examples(cfg, Counter()), tokenizer)
    whole = make_sentences(cfg, rows, Counter()).train.batch(2)["text/tokens"]
    parts = [
        make_sentences(cfg, rows, Counter(), process_index=i, process_count=2).train.batch(2)["text/tokens"]
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    other = make_rows(cfg, read_examples(config(PAIRS[:2]), Counter()), tokenizer)
    assert rows.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "x", "score": 1}, "missing field"),
        ({"a": "x", "b": "y", "score": "high"}, "no score: expected a number in 'score', found 'high'"),
        ({"a": "x", "b": "y"}, "no score"),
        ({"a": "x", "b": "y", "score": float("nan")}, "no score"),
        ({"a": "x", "b": "", "score": 1}, "empty"),
    ],
)
def test_a_bad_row_is_refused_by_name_or_counted(row, message):
    cfg = config((*PAIRS, row), examples="tuples", score_field="score")
    with pytest.raises(BadRow, match=f"memory:3: {message}"):
        read_examples(cfg, Counter())
    skipped: Counter[str] = Counter()
    skipping = config((*PAIRS, row), examples="tuples", score_field="score", bad_rows="skip")
    assert len(read_examples(skipping, skipped)) == 3 and sum(skipped.values()) == 1


def test_the_same_texts_give_the_same_tokenizer_and_its_files_give_it_back(tmp_path, tokenizer):
    texts = [row[field] for row in PAIRS for field in ("a", "b")]
    again = sentence_tokenizer("bpe:300", texts)
    assert again.fingerprint() == tokenizer.fingerprint() != train_bpe(texts, vocab_size=280).fingerprint()
    tokenizer.save(tmp_path)
    loaded = sentence_tokenizer(str(tmp_path), ())
    (ids,) = loaded.encode_sentences(["Ein Ünikum, 猫!"], max_tokens=64)
    assert loaded.decode(ids).strip() == "ein ünikum, 猫!"
    assert ids[0] == loaded.bos_id and ids[-1] == loaded.eos_id and loaded.pad_id == 1 and loaded.mask_id == 4


@pytest.mark.parametrize(("where", "message"), [("bpe:many", "bpe:8000"), ("bpe:100", "at least 261 ids")])
def test_a_size_that_cannot_be_is_refused(where, message):
    with pytest.raises(ValueError, match=message):
        sentence_tokenizer(where, ["text"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(score_field="score"), "is of tuples"),
        (dict(max_tokens=2), "at least 3"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
