"""Bytes and sentencepiece: nothing is lost on any text, and the bytes of the tokens add up to the text's."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from jaxlm.data.tokenizer_train import main, train_sentencepiece

ODD = [
    "",
    " ",
    "   leading and trailing   ",
    "tabs\t\tand\nnew\n\n\nlines\r\n\x0b\x0c\x00",
    "é e\u0301 ﬁ Å Å ① ｆｕｌｌ",  # what Unicode normalisation would change
    "日本語 العربية 😀👩‍👩‍👧‍👦 🇩🇪",
    "\u2581 the word mark\u2581\u2581 itself \u2581",
    "<s></s><unk><pad><0x0A> ⁇ ▅",
    "\ufeff\u200b\u2028\ufdd0\uffff\U0010ffff",
    "12345 1,000.50 x1y2",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    texts = open_source(SourceConfig("stdlib", limit=20))
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(train_sentencepiece((texts[i]["text"] for i in range(20)), vocab_size=700))
    return path


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, model_file):
    return load_tokenizer("bytes" if request.param == "bytes" else model_file)


@pytest.mark.parametrize("text", ODD)
def test_nothing_is_lost(tokenizer, text):
    for encode in (tokenizer.encode, tokenizer.encode_plain, tokenizer.encode_continuation):
        ids = encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_nothing_is_lost_on_random_text(model_file):
    tokenizer, sizes = load_tokenizer(model_file), load_tokenizer(model_file).token_bytes()
    rng = np.random.default_rng(0)
    frequent = list("  \n\t\u2581<>eat0\u0301\u200d\r")
    for _ in range(300):
        points = rng.integers(0, 0x110000, 30)
        characters = [chr(p) for p in points if not 0xD800 <= p < 0xE000] + list(rng.choice(frequent, 30))
        text = "".join(rng.permutation(characters))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())


def test_special_ids_have_no_bytes_and_vanish(tokenizer):
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert len(set(special)) == 3
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    np.testing.assert_array_equal(tokenizer.token_bytes()[special], 0)
    beyond = tokenizer.vocab_size  # models have rows beyond, to make their number round
    assert tokenizer.decode([special[0], *tokenizer.encode("a b"), *special[1:], beyond]) == "a b"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(loaded.encode(ODD[3]), tokenizer.encode(ODD[3]))


def test_sentencepiece_learns_newlines_and_runs_of_spaces(model_file):
    tokenizer = load_tokenizer(model_file)
    assert [len(tokenizer.encode(text)) for text in ("\n\n", ":\n", " " * 8, "self")] == [1] * 4


def test_sentencepiece_learns_from_lines_with_tabs(tmp_path):
    """The trainer by itself drops every line that holds a tab, or one of its own marks."""
    path = tmp_path / "m.model"
    path.write_bytes(train_sentencepiece(["alpha\tbeta▁gamma ▅delta\n"] * 200, vocab_size=290))
    tokenizer = SentencePieceTokenizer(path)
    assert [len(tokenizer.encode(word)) for word in ("alpha", "beta", "gamma", "delta")] == [1] * 4


def test_sentencepiece_splits_digits_and_keeps_symbols(tmp_path):
    path = tmp_path / "m.model"
    marks = ["<|im_start|>", "<|im_end|>"]
    path.write_bytes(
        train_sentencepiece(["in 2024 and 2025 and 2024"] * 50, vocab_size=275, user_defined_symbols=marks)
    )
    tokenizer = SentencePieceTokenizer(path)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024<|im_end|>")] == ["2", "0", "2", "4", "<|im_end|>"]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_model_that_puts_a_space_before_text_does_so_once(tmp_path):
    """As Llama 2's: the space belongs to the beginning of a text, not to every piece of a conversation."""
    path = tmp_path / "m.model"
    path.write_bytes(train_sentencepiece(["ab cd ab cd"] * 50, vocab_size=270, add_dummy_prefix=True))
    tokenizer = SentencePieceTokenizer(path)
    assert not tokenizer.lossless
    whole = tokenizer.encode("ab cd")
    np.testing.assert_array_equal(np.concatenate([tokenizer.encode("ab"), tokenizer.encode_continuation(" cd")]), whole)
    assert tokenizer.token_bytes()[whole].sum() == len(" ab cd")


@pytest.mark.parametrize("size, message", [(100_000, "=100000 .*too high"), (100, "smaller than required")])
def test_a_vocabulary_that_does_not_fit_the_text(size, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(["some text"] * 10, vocab_size=size)


@pytest.mark.parametrize("name", ["missing.model", "folder"])
def test_nothing_to_load(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"expected 'bytes', a sentencepiece \.model file, or a folder"):
        load_tokenizer(tmp_path / name)


def test_not_a_sentencepiece_model(tmp_path):
    (tmp_path / "x.model").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"x\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")


def test_command_trains_and_reports(tmp_path, capsys):
    import argparse

    from jaxlm.data import tokenizer_train

    (tmp_path / "a.jsonl").write_text("".join(f'{{"body": "the row number {i} of many"}}\n' for i in range(60)))
    parser = argparse.ArgumentParser()
    tokenizer_train.add_arguments(parser)
    options = ["--jsonl", str(tmp_path / "a.jsonl"), "--text-field", "body", "--vocab-size", "300"]
    options += ["--heldout-share", "0.2", "--out", str(tmp_path)]
    assert main(parser.parse_args(options)) == 0
    printed = capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path)
    heldout = open_source(
        SourceConfig("jsonl", path=str(tmp_path / "a.jsonl"), part="heldout", heldout_share=0.2, text_field="body")
    )
    texts = [heldout[i]["body"] for i in range(len(heldout))]
    rate = sum(map(len, texts)) / sum(len(tokenizer.encode(t)) for t in texts)
    assert "tokenizer.model: 300 pieces" in printed
    assert f"{rate:.3f} bytes per token on {len(texts)} rows" in printed
    assert main(parser.parse_args([*options, "--max-bytes", "600"])) == 0
    assert "rows: the others are beyond 600 bytes" in capsys.readouterr().out


def test_real_text(shared_data, model_file):
    peps = open_source(SourceConfig("jsonl", path=str(shared_data / "corpus" / "python_peps.jsonl.gz"), limit=40))
    tokenizer, sizes = SentencePieceTokenizer(model_file), SentencePieceTokenizer(model_file).token_bytes()
    for i in range(len(peps)):
        text = peps[i]["text"]
        ids = tokenizer.encode_plain(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
