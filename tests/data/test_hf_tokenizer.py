"""Hugging Face tokenizers: the ids and templates of transformers, and exact bytes for byte-level vocabularies."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxlm.data.chat import render
from jaxlm.data.encode import Encoder
from jaxlm.data.tokenizer import HFTokenizer, load_tokenizer

TEXTS = ["the quick brown fox", "def f(x):\n\treturn  x + 1\n", "é 日本 😀 ## heading", "  spaces  "]
MARKS = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] }}\n"
    "{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "the  quick é "},
    {"role": "assistant", "content": "brown\nfox"},
    {"role": "user", "content": "x + 1"},
    {"role": "assistant", "content": " return 😀"},
]


def save(tokenizer: tokenizers.Tokenizer, folder, **config) -> HFTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))
    return HFTokenizer(folder)


def byte_level(folder) -> HFTokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("Ġé", normalized=False)])  # an ordinary token, written as it is
    return save(tokenizer, folder, bos_token="<|begin|>", eos_token="<|im_end|>", chat_template=TEMPLATE)


def metaspace(folder) -> HFTokenizer:
    """As Llama 2: a space before the text, spaces as ▁, bytes for what is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["#"], show_progress=False
    )
    tokenizer.train_from_iterator(["▁the", "▁quick", "▁brown", "▁fox", "▁##", "▁heading"] * 9, trainer)
    spec = json.loads(tokenizer.to_str())
    first = len(spec["model"]["vocab"])
    spec["model"]["vocab"] |= {token: first + i for i, token in enumerate(fallback)}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return save(tokenizer, folder, bos_token={"__type": "AddedToken", "content": "<s>"}, eos_token="</s>")


@pytest.mark.parametrize("text", [*TEXTS, "", "a<|im_end|>b", "Ġé é"])
def test_byte_level_bytes_are_exact(text, tmp_path):
    tokenizer = byte_level(tmp_path)
    plain = tokenizer.encode_plain(text)
    assert tokenizer.token_bytes()[plain].sum() == len(text.encode())
    if "Ġ" not in text:  # the library decodes such an added token as if it were byte-level
        assert tokenizer.decode(plain) == text


def test_special_tokens_in_documents_are_text(tmp_path):
    tokenizer = byte_level(tmp_path)
    assert tokenizer.eos_id in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.eos_id not in tokenizer.encode_plain("a<|im_end|>b")
    document = Encoder(tokenizer)({"text": "a<|im_end|>b"}, "f:1")
    assert document.tokens[0] == tokenizer.bos_id
    assert (document.tokens == tokenizer.eos_id).tolist() == [False] * (len(document.tokens) - 1) + [True]
    assert document.target_bytes.sum() == len("a<|im_end|>b")


def test_byte_fallback_bytes_count_the_space_before_the_text(tmp_path):
    tokenizer = metaspace(tmp_path)
    for text in ("the quick 😀 fox", "## é", "the\n\tfox"):
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(f" {text}".encode())
        assert tokenizer.token_bytes()[tokenizer.encode_continuation(text)].sum() == len(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_continuation_joins_without_a_space(tmp_path):
    tokenizer = metaspace(tmp_path)
    joined = np.concatenate([tokenizer.encode("the quick"), tokenizer.encode_continuation(" brown fox")])
    np.testing.assert_array_equal(joined, tokenizer.encode("the quick brown fox"))


def test_wordpiece_marks_are_not_counted(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = save(tokenizer, tmp_path, unk_token="[UNK]")
    ids = loaded.encode("playing play")
    assert ids.tolist() == [1, 2, 1]
    assert loaded.token_bytes()[ids].tolist() == [4, 3, 4]


def test_ids_and_special_tokens(tmp_path):
    tokenizer = byte_level(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 2)
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    assert tokenizer.token_bytes()[:3].tolist() == [0, 0, 0]
    assert tokenizer.vocab_size == 301
    assert tokenizer.decode([0, *tokenizer.encode("fox"), 2]) == "fox"


def test_the_mask_token_and_all_tokens_that_are_no_text(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "[MASK]": 2, "[CLS]": 3}, unk_token="[PAD]"))
    tokenizer.add_special_tokens(["[CLS]", "[MASK]"])
    ours = save(tokenizer, tmp_path, mask_token="[MASK]", pad_token="[PAD]")
    assert ours.mask_id == 2 and ours.special_ids == (0, 2, 3)
    assert byte_level(tmp_path / "none").mask_id is None


def test_vocab_size_counts_holes(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    assert save(tokenizer, tmp_path).vocab_size == 8


def test_save_and_load(tmp_path):
    tokenizer = byte_level(tmp_path / "a")
    tokenizer.save(tmp_path / "b")
    loaded = load_tokenizer(tmp_path / "b")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.chat_template == TEMPLATE
    np.testing.assert_array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))
    (tmp_path / "b" / "chat_template.jinja").write_text("other")
    changed = load_tokenizer(tmp_path / "b")
    assert changed.chat_template == "other"
    assert changed.fingerprint() != tokenizer.fingerprint()


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert save(tokenizer, tmp_path, chat_template=named).chat_template == "y"


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_ids_are_those_of_transformers(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = make(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*TEXTS, "a<|im_end|>b", "the </s> fox"]:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)


def test_conversations_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = byte_level(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        variables = ours.special_tokens
        assert render(MESSAGES, template=TEMPLATE, add_generation_prompt=prompt, **variables) == expected
    ids = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]
    document = Encoder(ours)({"messages": MESSAGES}, "f:1")
    assert document.tokens.tolist() == ids


def test_the_mask_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = TEMPLATE.replace(
        "{{ m['content'] | trim }}{{ eos_token }}\n",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim }}{{ eos_token }}{% endif %}\n\n",
    )
    ours = byte_level(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    document = Encoder(ours, template=template)({"messages": MESSAGES}, "f:1")
    assert document.tokens.tolist() == expected["input_ids"]
    assert document.mask.astype(int).tolist() == expected["assistant_masks"]
    assert 0 < document.mask.sum() < len(document.mask)
