"""How rows of preferences become pairs and responses, to the token, and which rows are refused."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import pipeline
from jaxlm.data.errors import BadRow
from jaxlm.data.tokenizer import ByteTokenizer

ROWS = runpy.run_path(str(Path(__file__).with_name("preference_rows.py")))
BYTES, TEMPLATE, said, user, assistant, config, corpus, shown, many = (
    ROWS[name] for name in ("BYTES", "TEMPLATE", "said", "user", "assistant", "config", "corpus", "shown", "many")
)

PAIRS = {
    "strings": ({"prompt": "ab", "chosen": "c", "rejected": "de"}, {}, "^ab[c][$]", "^ab[d][e][$]"),
    "an empty prompt": ({"prompt": "", "chosen": "c", "rejected": "de"}, {}, "^[c][$]", "^[d][e][$]"),
    "other names": (
        {"q": "ab", "good": "c", "bad": "d"},
        dict(fields=dict(prompt_field="q", chosen_field="good", rejected_field="bad")),
        "^ab[c][$]",
        "^ab[d][$]",
    ),
    "message lists": (
        {"prompt": [user("q")], "chosen": [assistant("r")], "rejected": [assistant("st")]},
        {},
        "^uq;a[r][;]",
        "^uq;a[s][t][;]",
    ),
    "replies of several turns": (
        {"prompt": [user("q")], "chosen": [assistant("r"), user("s"), assistant("t")], "rejected": [assistant("v")]},
        {},
        "^uq;a[r][;]us;a[t][;]",
        "^uq;a[v][;]",
    ),
    "an assistant's turn in the prompt is context": (
        {
            "prompt": [user("q"), assistant("r"), user("s")],
            "chosen": [assistant("r")],
            "rejected": [assistant("t")],
        },
        {},
        "^uq;ar;us;a[r][;]",
        "^uq;ar;us;a[t][;]",
    ),
    "whole conversations as text": (
        {"chosen": "\n\nHuman: q\n\nAssistant: r", "rejected": "\n\nHuman: q\n\nAssistant: st"},
        {},
        "^\n\nHuman: q\n\nAssistant:[ ][r][$]",
        "^\n\nHuman: q\n\nAssistant:[ ][s][t][$]",
    ),
    "the last marker counts": (
        {"chosen": "H:q A:r H:s A:t", "rejected": "H:q A:r H:s A:v"},
        dict(fields=dict(reply_marker="A:")),
        "^H:q A:r H:s A:[t][$]",
        "^H:q A:r H:s A:[v][$]",
    ),
    "a prompt that is null": (
        {"prompt": None, "chosen": "q A:t", "rejected": "q A:v"},
        dict(fields=dict(reply_marker="A:")),
        "^q A:[t][$]",
        "^q A:[v][$]",
    ),
    "whole conversations as messages": (
        {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("st")]},
        {},
        "^uq;a[r][;]",
        "^uq;a[s][t][;]",
    ),
    "first messages in common": (
        {
            "chosen": [said("system", "S"), user("q"), assistant("r"), user("s"), assistant("t")],
            "rejected": [said("system", "S"), user("q"), assistant("r"), user("s"), assistant("v")],
        },
        {},
        "^sS;uq;ar;us;a[t][;]",
        "^sS;uq;ar;us;a[v][;]",
    ),
    "apart from the first reply on": (
        {"chosen": [user("q"), assistant("r"), user("s"), assistant("t")], "rejected": [user("q"), assistant("v")]},
        {},
        "^uq;a[r][;]us;a[t][;]",
        "^uq;a[v][;]",
    ),
    "the same reply twice": (
        {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("r")]},
        {},
        "^uq;a[r][;]",
        "^uq;a[r][;]",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_golden_pairs(case):
    row, options, chosen, rejected = PAIRS[case]
    pair = corpus([row], chat_template=TEMPLATE, **options)
    assert [shown(pair[i]) for i in (0, 1)] == [chosen, rejected]
    assert list(pair.origins) == ["memory:0 chosen", "memory:0 rejected"]
    for i in (0, 1):
        assert (pair[i].tokens == BYTES.bos_id).tolist() == [True] + [False] * (len(pair[i].tokens) - 1)
        assert not pair[i].mask[0]
    prompts = [pair[i].tokens[: np.argmax(pair[i].mask)] for i in (0, 1)]
    np.testing.assert_array_equal(*prompts)


def test_tools_reach_the_template():
    row = PAIRS["message lists"][0] | {"tools": ["T"]}
    pair = corpus([row], chat_template="{{ tools[0] }}" + TEMPLATE)
    assert [shown(pair[i]) for i in (0, 1)] == ["^Tuq;a[r][;]", "^Tuq;a[s][t][;]"]


class Merging(ByteTokenizer):
    """Bytes, but 'bc' is one token: a prompt that ends in b must not lose it to the completion."""

    def encode(self, text: str) -> np.ndarray:
        ids = super().encode(text.replace("bc", "\x01"))
        return np.where(ids == 1, 259, ids)

    encode_plain = encode_continuation = encode
    vocab_size = 260

    def token_bytes(self) -> np.ndarray:
        return np.append(super().token_bytes()[:259], 2)

    def fingerprint(self) -> str:
        return "merging"


def test_prompt_and_completion_are_tokenised_by_themselves():
    data = pipeline.build(config([{"prompt": "ab", "chosen": "c", "rejected": "bc"}]), Merging())
    pair = data.train.sources[0].corpus
    assert [pair[i].tokens.tolist() for i in (0, 1)] == [[256, 97, 98, 99, 257], [256, 97, 98, 259, 257]]


@pytest.mark.parametrize(
    ("label", "expected"), [(True, True), (False, False), (1, True), (0, False)], ids=["true", "false", "1", "0"]
)
def test_golden_responses(label, expected):
    rows = [
        {"prompt": "ab", "completion": "cd", "label": label},
        {"prompt": [user("q")], "completion": [assistant("r")], "label": label},
        {"messages": [user("q"), assistant("r")], "label": label},
    ]
    found = corpus(rows, examples="responses", chat_template=TEMPLATE)
    assert [shown(found[i]) for i in range(3)] == ["^ab[c][d][$]", "^uq;a[r][;]", "^uq;a[r][;]"]
    assert [found[i].label for i in range(3)] == found.labels.tolist() == [expected] * 3
    assert found.labels.dtype == np.bool_
    renamed = [{"prompt": "ab", "completion": "cd", "good": label, "label": "no"}]
    assert corpus(renamed, examples="responses", fields=dict(label_field="good")).labels.tolist() == [expected]


REPLIES = {"prompt": [user("q")], "chosen": [assistant("r")], "rejected": [assistant("s")]}
WHOLE = {"chosen": "q\n\nAssistant: r", "rejected": "q\n\nAssistant: s"}
BAD_PAIRS = [
    ({}, "missing field", "expected 'chosen', found "),
    ({"prompt": "a", "chosen": "b"}, "missing field", "expected 'rejected', found 'chosen', 'prompt'"),
    ({"prompt": "a", "rejected": "b"}, "missing field", "expected 'chosen', found 'prompt', 'rejected'"),
    (
        {"prompt": "a", "chosen": "b", "rejected": 3},
        "wrong type",
        "expected prompt, chosen and rejected of one kind, found str, str, int",
    ),
    ({"prompt": "a", "chosen": [assistant("b")], "rejected": "c"}, "wrong type", "found str, list, str"),
    (REPLIES | {"rejected": "s"}, "wrong type", "found list, list, str"),
    (REPLIES | {"prompt": "q"}, "wrong type", "found str, list, list"),
    ({"prompt": 1, "chosen": 2, "rejected": 3}, "wrong type", "list of messages, found int"),
    (WHOLE | {"rejected": None}, "wrong type", "expected 'rejected' to be text, found NoneType"),
    (WHOLE | {"chosen": None}, "wrong type", "found NoneType and str"),
    ({"chosen": [user("q"), assistant("r")], "rejected": "s"}, "wrong type", "found list and str"),
    (REPLIES | {"rejected": ["s"]}, "wrong type", "needs a text field 'role'"),
    (REPLIES | {"rejected": [said("assistant", None)]}, "wrong type", "needs text in 'content'"),
    (WHOLE | {"rejected": "p\n\nAssistant: s"}, "different prompts", "differ before their last '\\n\\nAssistant:'"),
    ({"chosen": [user("q"), assistant("r")], "rejected": [user("p"), assistant("s")]}, "different prompts", "share no"),
    ({"chosen": [user("q")], "rejected": [user("q")]}, "different prompts", "share no first message"),
    ({"chosen": [], "rejected": []}, "different prompts", "share no first message"),
    (WHOLE | {"chosen": "q: r"}, "no reply", "expected '\\n\\nAssistant:' before the last reply (or set reply_marker)"),
    (WHOLE | {"rejected": ""}, "empty", "'rejected' has no text"),
    (WHOLE | {"rejected": "q\n\nAssistant:"}, "empty", "has no text"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty", "has no text"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty", "has no text"),
    (REPLIES | {"rejected": []}, "empty", "has no messages"),
    (REPLIES | {"prompt": []}, "empty", "'prompt' has no messages"),
    (WHOLE | {"chosen": "q\n\nAssistant: \ud800"}, "broken UTF-8", "lone surrogate at 14"),
    (REPLIES | {"chosen": [user("r")]}, "conversation", "no assistant message to train on"),
    ("text", "wrong type", "expected a dict, found str"),
]
LABELLED = {"prompt": "a", "completion": "b", "label": True}
BAD_RESPONSES = [
    (LABELLED | {"label": "true"}, "wrong label", "expected 'label' to be true or false, found 'true'"),
    (LABELLED | {"label": None}, "wrong label", "found None"),
    (LABELLED | {"label": 2}, "wrong label", "found 2"),
    (LABELLED | {"label": [True]}, "wrong label", "found [True]"),
    ({"prompt": "a", "completion": "b"}, "wrong label", "found none"),
    (LABELLED | {"completion": ""}, "empty", "'completion' has no text"),
    ({"prompt": "a", "label": True}, "missing field", "expected 'text', found 'label', 'prompt'"),
]


@pytest.mark.parametrize(
    ("examples", "row", "reason", "found"),
    [("pairs", *bad) for bad in BAD_PAIRS] + [("responses", *bad) for bad in BAD_RESPONSES],
)
def test_bad_rows_are_named_or_counted(examples, row, reason, found):
    good = {"pairs": {"prompt": "a", "chosen": "b", "rejected": "c"}, "responses": LABELLED}[examples]
    with pytest.raises(BadRow) as error:
        corpus([good, row], examples=examples)
    assert error.value.reason == reason
    assert str(error.value).startswith(f"memory:1: {reason}: ")
    assert found in str(error.value)
    assert "bad_rows='skip'" in str(error.value)
    data = pipeline.build(config([row, good, row], examples=examples, bad_rows="skip"), BYTES)
    assert data.skipped == {reason: 2}
    assert data.train.num_steps == 1


def test_one_side_of_pairs_is_refused_like_the_pair():
    for side in ("chosen", "rejected"):
        with pytest.raises(BadRow, match="memory:0: missing field: expected 'rejected'"):
            corpus([{"prompt": "a", "chosen": "b"}], examples=side)


def test_different_questions_under_one_system_message_are_no_pair():
    """As text, the same rows are refused: they differ before their last reply."""
    system = said("system", "S")
    row = {"chosen": [system, user("q"), assistant("r")], "rejected": [system, user("p"), assistant("s")]}
    with pytest.raises(BadRow, match="memory:0: different prompts"):
        corpus([row])


@pytest.mark.parametrize("examples", ["pairs", "responses", "responses_mismatched"])
def test_prompts_are_never_part_of_a_response(examples):
    with pytest.raises(ValueError, match="completion_only"):
        config([], examples=examples, completion_only=False)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_reply_is_named_by_its_side(side):
    with pytest.raises(BadRow, match=f"memory:0.*{side}.*has no text"):
        corpus([{"prompt": "a", "chosen": "b", "rejected": "c", side: ""}])


def test_chosen_and_rejected_are_documents_by_themselves():
    rows = many(5)
    pairs = corpus(rows)
    for k, side in enumerate(("chosen", "rejected")):
        one = corpus(rows, examples=side)
        assert len(one) == 5 and config(rows, examples=side).group == 1
        for i in range(5):
            assert shown(one[i]) == shown(pairs[2 * i + k])
            assert one.origins[i] == f"memory:{i} {side}"
