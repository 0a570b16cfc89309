"""Samples of reasoning: what is read, what is refused, and rows that hold every sentence at its place."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from jaxlm.data.errors import BadRow
from jaxlm.data.reasoning import Sample, gsm8k, make_sample_rows, newline_id, sample_of
from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer import ByteTokenizer

SAMPLES = [Sample("Two?", ("1 + 1 =", "is 2"), "2"), Sample("Five and one?", (), "6")]


def test_rows_hold_every_sentence_at_its_place():
    rows, left_out = make_sample_rows(
        SAMPLES, ByteTokenizer(), origin="toy", max_steps=4, max_step_tokens=8, max_question_tokens=20
    )
    assert left_out == 0
    decode = ByteTokenizer().decode
    for i, sample in enumerate(SAMPLES):
        row = rows.row(i)
        text = row["text/tokens"][row["text/segments"] == 1]
        assert decode(text) == "\n".join([sample.question, *sample.sentences, ""])
        assert decode(row["question/tokens"][row["question/segments"] == 1]) == sample.question + "\n"
        n = len(sample.sentences)
        assert [decode(text[: end + 1]).count("\n") for end in row["ends"]] == [*range(1, n + 2), *[n + 1] * (4 - n)]
        assert set(text[row["ends"]]) == {newline_id(ByteTokenizer())}
        written = [decode(t[s == 1]) for t, s in zip(row["steps"], row["step_segments"])]
        assert written == [*(s + "\n" for s in sample.sentences), *[""] * (4 - n)]
        assert row["steps"].shape == (4, 8)


@pytest.mark.parametrize(("limits", "kept"), [((2, 8, 20), 1), ((4, 7, 20), 1), ((4, 8, 8), 0)])
def test_what_is_too_long_is_left_out_whole_and_counted(limits, kept):
    limits = dict(zip(("max_steps", "max_step_tokens", "max_question_tokens"), limits))
    rows, left_out = make_sample_rows(SAMPLES, ByteTokenizer(), origin="toy", **limits)
    assert (len(rows.plan), left_out) == (1, 1) and rows.origins(0) == [f"toy:{kept}"]
    with pytest.raises(ValueError, match="all 2 samples are longer than max_steps=1, max_step_tokens=2"):
        make_sample_rows(SAMPLES, ByteTokenizer(), origin="toy", max_steps=1, max_step_tokens=2, max_question_tokens=3)


def read_samples(source):
    rows = open_source(source)
    return (sample_of(rows[i], rows.origin(i)) for i in range(len(rows)))


def test_jsonl_of_ones_own_is_read_and_bad_rows_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(vars(s)) + "\n" for s in SAMPLES))
    assert list(read_samples(SourceConfig("jsonl", path=str(path)))) == SAMPLES
    twice = {"question": "q", "steps": ["because", "### D"], "answer": "D"}  # as CommonsenseQA is published
    path.write_text(json.dumps(twice) + "\n")
    assert next(read_samples(SourceConfig("jsonl", path=str(path)))).sentences == ("because", "### D")
    for row, message in [
        ({"question": "q", "answer": "a"}, "mine.jsonl:1.*list of texts in 'steps', found None"),
        ({"question": "q", "steps": ["a\nb"], "answer": "a"}, "mine.jsonl:1.*holds a newline"),
        ({"question": "q", "steps": [""], "answer": "a"}, "mine.jsonl:1.*a step is empty"),
        ({"question": "q", "steps": ["s"]}, "mine.jsonl:1.*expected 'answer'"),
    ]:
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(BadRow, match=message):
            list(read_samples(SourceConfig("jsonl", path=str(path))))


def test_gsm8k_has_the_equations_that_were_counted(shared_data):
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt") as file:
        found = [gsm8k(json.loads(line), f"train:{i}") for i, line in enumerate(file)]
    assert len(found) == 7473 and sum(bool(s.steps) for s in found) == 7378
    assert sum(s.steps[-1:] == (f"{s.steps[-1].rpartition('=')[0]}={s.answer}>>",) for s in found if s.steps) == 6843
    assert np.mean([len(s.steps) for s in found if s.steps]) == pytest.approx(3.2, abs=0.05)
    with pytest.raises(BadRow, match="expected '#### <number>'"):
        gsm8k({"question": "q", "answer": "5"}, "row 0")
    with pytest.raises(BadRow, match="row 0.*answer is empty"):
        gsm8k({"question": "q", "answer": "so #### "}, "row 0")
    with pytest.raises(ValueError, match="toy: there is no sample"):
        make_sample_rows([], ByteTokenizer(), origin="toy", max_steps=1, max_step_tokens=1, max_question_tokens=1)
