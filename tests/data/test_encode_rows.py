"""From rows to documents: shapes of rows, masks to the token, bytes to the byte, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.encode import Encoder
from jaxlm.data.errors import BadRow
from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from jaxlm.data.tokenizer_train import train_sentencepiece

BYTES = ByteTokenizer()
MESSAGES = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "yé"}]


def shown(document) -> str:
    """Tokens as characters (begin ^, end $), those that are predicted in brackets."""
    out = ""
    for token, trained in zip(document.tokens, document.mask):
        character = {256: "^", 257: "$"}.get(int(token)) or chr(token)
        out += f"[{character}]" if trained else character
    return out


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "ab"}, {}, "^[a][b][$]"),
        ({"body": "ab", "text": 3}, dict(text_field="body"), "^[a][b][$]"),
        ({"prompt": "ab", "completion": "cd"}, {}, "^ab[c][d][$]"),
        ({"prompt": "", "completion": "cd"}, {}, "^[c][d][$]"),
        ({"prompt": "ab", "completion": "cd"}, dict(completion_only=False), "^[a][b][c][d][$]"),
        ({"q": "a", "a": "b"}, dict(prompt_field="q", completion_field="a"), "^a[b][$]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, dict(template="{{ messages[0].content }}"), None),
        (
            {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
            dict(
                messages_field="chat",
                template="{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}"
                "{% if add_generation_prompt %}a{% endif %}",
            ),
            "^uq;a[r][;]",
        ),
    ],
)
def test_golden_documents(row, options, expected):
    if expected is None:  # a template that ignores what comes after its first message: no place for the reply
        with pytest.raises(BadRow, match=r"f:1: conversation: .*refused the messages"):
            Encoder(BYTES, **options)(row, "f:1")
        return
    document = Encoder(BYTES, **options)(row, "f:1")
    assert shown(document) == expected
    assert document.origin == "f:1"
    assert [a.dtype for a in document[:3]] == [np.int32, np.bool_, np.int32]


def test_bytes_are_those_of_the_text():
    document = Encoder(BYTES)({"text": "aé"}, "f:1")
    assert document.target_bytes.tolist() == [0, 1, 1, 1, 0]
    assert Encoder(BYTES)({"prompt": "é", "completion": "日"}, "f:1").target_bytes.sum() == 5


def test_prompt_and_completion_as_messages_are_a_conversation():
    prompt = [*MESSAGES, {"role": "user", "content": "so?"}]
    reply = [{"role": "assistant", "content": "yé"}]
    encode = Encoder(BYTES)
    joined = encode({"prompt": prompt, "completion": reply}, "f:1")
    whole = encode({"messages": prompt + reply}, "f:1")
    np.testing.assert_array_equal(joined.tokens, whole.tokens)
    trained = BYTES.decode(joined.tokens[joined.mask])
    assert trained == "yé<|im_end|>"  # the reply in the prompt, though it is the same, is context
    assert BYTES.decode(whole.tokens[whole.mask]) == "yé<|im_end|>" * 2


def test_tools_and_special_tokens_reach_the_template():
    tokenizer = ByteTokenizer()
    tokenizer.special_tokens = {"eos_token": "</s>"}
    template = "{{ tools[0] }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    document = Encoder(tokenizer, template=template)({"messages": MESSAGES, "tools": ["T"]}, "f:1")
    assert tokenizer.decode(document.tokens) == "Té?</s>yé</s>"


def test_a_template_that_writes_the_begin_token_gets_no_second_one(tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(train_sentencepiece(["ab cd"] * 50, vocab_size=270, user_defined_symbols=["<b>"]))
    tokenizer = SentencePieceTokenizer(path)
    tokenizer.bos_id = int(tokenizer.encode("<b>")[0])
    for begin in ("<b>", ""):
        template = begin + "{% for m in messages %}{{ m.content }}{% endfor %}"
        document = Encoder(tokenizer, template=template)({"messages": MESSAGES}, "f:1")
        assert (document.tokens == tokenizer.bos_id).tolist() == [True] + [False] * (len(document.tokens) - 1)
        assert not document.mask[0]


BAD = [
    ({}, "missing field", "expected 'text', found nothing"),
    ({"txt": "a", "id": 1}, "missing field", "expected 'text', found 'id', 'txt'"),
    ({"prompt": "a"}, "missing field", "expected 'text', found 'prompt'"),
    ({"text": 3}, "wrong type", "expected 'text' to be text, found int"),
    ({"text": None}, "wrong type", "found NoneType"),
    ({"text": b"a"}, "wrong type", "found bytes"),
    ({"text": ""}, "empty", "'text' has no text"),
    ({"text": "a\ud800"}, "broken UTF-8", "lone surrogate at 1"),
    ({"prompt": "a", "completion": ""}, "empty", "'completion' has no text"),
    ({"prompt": "a", "completion": ["b"]}, "wrong type", "expected 'completion' to be text, found list"),
    ({"prompt": 1, "completion": "b"}, "wrong type", "expected 'prompt' to be a list of messages, found int"),
    ({"messages": "hi"}, "wrong type", "list of messages, found str"),
    ({"messages": []}, "empty", "'messages' has no messages"),
    ({"messages": [{"content": "a"}]}, "wrong type", "message 0 of 'messages' needs a text field 'role'"),
    ({"messages": ["a"]}, "wrong type", "message 0 of 'messages' needs a text field 'role'"),
    ({"messages": [*MESSAGES, {"role": "user"}]}, "wrong type", "message 2 of 'messages' needs text in 'content'"),
    ({"messages": [{"role": "user", "content": 5}]}, "wrong type", "needs text in 'content', found 5"),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, "broken UTF-8", "lone surrogate at 0"),
    ({"messages": MESSAGES[:1]}, "conversation", "no assistant message to train on"),
]


@pytest.mark.parametrize(("row", "reason", "found"), BAD)
def test_bad_rows_are_named(row, reason, found):
    with pytest.raises(BadRow) as error:
        Encoder(BYTES)(row, "data.jsonl:7")
    assert error.value.reason == reason
    assert str(error.value).startswith(f"data.jsonl:7: {reason}: ")
    assert found in str(error.value)
    assert "bad_rows='skip'" in str(error.value)


def config(rows, **options) -> DataConfig:
    base = dict(train=(SourceConfig("memory", rows=tuple(rows)),), sequence_length=8, batch_size=1, packing="pad")
    return DataConfig(**base | options)


GOOD_AND_BAD = [{"text": "good"}, {"text": ""}, {"prompt": "a", "completion": "b" * 20}, {"text": 1}, {"text": "fine"}]


def test_refused_at_the_first_bad_row():
    with pytest.raises(BadRow, match="memory:1: empty"):
        pipeline.build(config(GOOD_AND_BAD), BYTES)
    with pytest.raises(BadRow, match=r"memory:2: over-long: 22 targets, sequence_length=8 .*data\.overlong"):
        pipeline.build(config(GOOD_AND_BAD, bad_rows="skip"), BYTES)


def test_skipped_and_counted():
    data = pipeline.build(config(GOOD_AND_BAD, bad_rows="skip", overlong="skip"), BYTES)
    assert data.skipped == {"empty": 1, "wrong type": 1, "over-long": 1}
    assert data.train.num_steps == 2
    data = pipeline.build(config(GOOD_AND_BAD, bad_rows="skip", overlong="truncate"), BYTES)
    assert data.skipped == {"empty": 1, "wrong type": 1, "truncated": 1}
    assert data.train.num_steps == 3
    with pytest.raises(ValueError, match=r"every row was left out: \{'empty': 1\}"):
        pipeline.build(config([{"text": ""}], bad_rows="skip"), BYTES)


def test_a_truncated_example_without_target_is_left_out_and_counted():
    rows = [{"prompt": "p" * 20, "completion": "c"}, {"text": "good"}]
    data = pipeline.build(config(rows, overlong="truncate"), BYTES)
    assert data.skipped == {"over-long": 1}
    assert data.train.num_steps == 1


def test_the_cache_remembers_what_is_missing_and_notices_a_changed_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    source = SourceConfig("jsonl", path=str(path))
    cfg = config((), train=(source,), bad_rows="skip", cache_dir=str(tmp_path / "cache"), shuffle=False)
    first, again = (pipeline.build(cfg, BYTES) for _ in range(2))
    assert first.skipped == again.skipped == {"empty": 1}
    assert first.fingerprint == again.fingerprint
    np.testing.assert_array_equal(first.train.batch(1)["targets"], again.train.batch(1)["targets"])
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "tow"}\n')
    changed = pipeline.build(cfg, BYTES)
    assert changed.fingerprint != first.fingerprint
    assert BYTES.decode(changed.train.batch(1)["targets"][0]) == "tow"


def test_real_conversations_and_problems(shared_data):
    source = SourceConfig(
        "jsonl", path=str(shared_data / "gsm8k" / "train.jsonl.gz"), prompt_field="question", completion_field="answer"
    )
    rows = open_source(source)
    encode = Encoder(BYTES, prompt_field="question", completion_field="answer")
    for i in range(0, len(rows), 150):
        document = encode(rows[i], rows.origin(i))
        assert BYTES.decode(document.tokens[document.mask]) == rows[i]["answer"]
        assert document.target_bytes.sum() == len((rows[i]["question"] + rows[i]["answer"]).encode())
