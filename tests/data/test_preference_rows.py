"""Preference data: every shape of row to the token, what is refused, what is cut, and how pairs lie in rows."""

from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import pipeline
from jaxlm.data.batch import FIELDS
from jaxlm.data.config import DataConfig
from jaxlm.data.document import Document
from jaxlm.data.errors import BadRow
from jaxlm.data.fit import fit, shares
from jaxlm.data.loader import eval_batches
from jaxlm.data.preference import with_mismatched
from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
# Short on purpose: the first letter of the role, the text, and a mark that ends the turn.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, str]:
    return said("user", content)


def assistant(content: str) -> dict[str, str]:
    return said("assistant", content)


def config(rows=(), **options) -> DataConfig:
    source = SourceConfig("memory", rows=tuple(rows), **options.pop("fields", {}))
    base = dict(train=(source,), sequence_length=64, batch_size=1, packing="pad", examples="pairs", shuffle=False)
    return DataConfig(**base | options)


def corpus(rows=(), **options):
    return pipeline.build(config(rows, **options), BYTES).train.sources[0].corpus


def shown(document: Document) -> str:
    """Tokens as characters (begin ^, end $), those that are predicted in brackets."""
    out = ""
    for token, trained in zip(document.tokens, document.mask):
        character = {256: "^", 257: "$"}.get(int(token)) or chr(token)
        out += f"[{character}]" if trained else character
    return out


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


def test_a_mismatched_completion_answers_another_prompt():
    """Labelled rows made from pairs come as two answers to each prompt, side by side."""
    rows = [{"prompt": f"<{i // 2}>", "completion": f"c{i}", "label": i % 2 == 0} for i in range(6)]
    found = corpus(rows, examples="responses_mismatched")
    for i, row in enumerate(rows):
        borrowed = BYTES.decode(found[2 * i + 1].tokens[found[2 * i + 1].mask])
        answers = {other["completion"] for other in rows if other["prompt"] == row["prompt"]}
        assert borrowed not in answers


def test_preferences_are_never_cut_into_a_stream():
    for examples in ("pairs", "chosen", "rejected", "responses", "responses_mismatched"):
        with pytest.raises(ValueError, match=f"data.examples='{examples}' are never cut.*'pack'.*'pad'"):
            config([], examples=examples, packing="stream")


def test_shares_give_the_shorter_ones_all_they_need():
    cases = [
        ([10, 50], 40, [10, 30]), ([50, 10], 40, [30, 10]), ([30, 50], 40, [20, 20]), ([5, 8], 40, [5, 8]),
        ([20, 21], 40, [20, 20]), ([9, 9], 7, [3, 4]), ([7], 3, [3]), ([1, 2, 30], 12, [1, 2, 9]), ([5, 5], 0, [0, 0]),
    ]  # fmt: skip
    for lengths, total, expected in cases:
        assert shares(lengths, total) == expected
    for lengths in np.random.default_rng(0).integers(0, 50, (200, 3)).tolist():
        total = sum(lengths) // 2
        given = shares(lengths, total)
        assert sum(given) == total and all(0 <= g <= n for g, n in zip(given, lengths))
        cut = [g for g, n in zip(given, lengths) if g < n]
        assert max(cut) - min(cut) <= 1 and all(g <= min(cut) for g, n in zip(given, lengths) if g == n)


def pair_of(prompt: int, chosen: int, rejected: int) -> dict[str, str]:
    """A pair of responses; in targets: prompt + chosen + 1 and prompt + rejected + 1."""
    return {"prompt": "p" * prompt, "chosen": "c" * chosen, "rejected": "r" * rejected}


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (pair_of(4, 7, 7), ["^pppp[c][c][c][c]", "^pppp[r][r][r][r]"]),
        (pair_of(4, 1, 20), ["^pppp[c][$]", "^pppp[r][r][r][r][r][r]"]),  # 6 targets are left 10
        (pair_of(4, 20, 1), ["^pppp[c][c][c][c][c][c]", "^pppp[r][$]"]),
        (pair_of(7, 9, 9), ["^ppppppp[c]", "^ppppppp[r]"]),
        (pair_of(2, 5, 5), ["^pp[c][c][c][c][c][$]", "^pp[r][r][r][r][r][$]"]),  # as long as it may be: whole
    ],
)
def test_a_pair_is_cut_at_the_end_of_both(pair, expected):
    data = pipeline.build(config([pair], sequence_length=16, overlong="truncate"), BYTES)
    cut = data.train.sources[0].corpus
    assert [shown(cut[i]) for i in (0, 1)] == expected
    assert data.skipped == ({} if expected[0].endswith("[$]") and expected[1].endswith("[$]") else {"truncated": 1})


@pytest.mark.parametrize("pair", [pair_of(8, 9, 9), pair_of(16, 1, 1), pair_of(40, 9, 9), pair_of(8, 1, 20)])
def test_a_cut_never_leaves_an_empty_completion(pair):
    """Pairs of which one side would keep no target are left out, both, and counted."""
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    data = pipeline.build(config([pair, good], sequence_length=16, overlong="truncate"), BYTES)
    kept = data.train.sources[0].corpus
    assert [shown(kept[i]) for i in range(len(kept))] == ["^p[c][$]", "^p[r][$]"]
    assert data.skipped == {"over-long": 1}


def test_what_fits_a_row_is_decided_by_the_pair():
    cfg = config([pair_of(2, 5, 6)], sequence_length=16)  # 8 + 9 targets
    with pytest.raises(BadRow, match=r"^memory:0 chosen: over-long: 8 \+ 9 targets, .*=16 .*data\.overlong"):
        pipeline.build(cfg, BYTES)
    with pytest.raises(BadRow, match=r"over-long: 8 \+ 9 targets"):  # bad_rows is about rows that cannot be used
        pipeline.build(config([pair_of(2, 5, 6)], sequence_length=16, bad_rows="skip"), BYTES)
    rows = [pair_of(2, 5, 6), pair_of(2, 5, 5)]
    data = pipeline.build(config(rows, sequence_length=16, overlong="skip"), BYTES)
    assert data.skipped == {"over-long": 1}
    assert len(data.train.sources[0].corpus) == 2
    # One side of the pair by itself fits.
    assert len(corpus(rows, examples="rejected", sequence_length=16)) == 2


def test_a_cut_keeps_label_and_bytes():
    document = Document(np.arange(6), np.array([0, 0, 0, 1, 1, 1], bool), np.arange(6), "f:0", label=True)
    skipped = collections.Counter()
    (cut,) = fit((document,), config(sequence_length=3, overlong="truncate", examples="responses"), skipped)
    assert [x.tolist() for x in cut[:3]] == [[0, 1, 2, 3], [False, False, False, True], [0, 1, 2, 3]]
    assert cut.label is True and skipped == {"truncated": 1}


def many(n: int = 23, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of ragged lengths that tell their number: "<i>" asks, "c<i>…" is chosen, "r<i>…" rejected."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"<{i}>" + "p" * rng.integers(5),
            "chosen": f"c{i}" + "." * rng.integers(9),
            "rejected": f"r{i}" + "." * rng.integers(9),
        }
        for i in range(n)
    ]


def texts_of(row: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """(context, what is predicted) of every segment of a row."""
    found = []
    for s in range(1, row["segments"].max() + 1):
        here = row["segments"] == s
        predicted = here & row["mask"]
        assert row["positions"][here].tolist() == list(range(here.sum()))
        context = row["inputs"][here][: np.argmax(row["mask"][here]) + 1]
        found.append((BYTES.decode(context), BYTES.decode(row["targets"][predicted])))
    return found


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_pairs_stay_whole_and_come_once_an_epoch(packing):
    rows = many()
    cfg = config(rows, packing=packing, shuffle=True, heldout=(SourceConfig("memory", rows=tuple(rows), name="h"),))
    data = pipeline.build(cfg, BYTES)
    seen, packed = [], 0
    for step in range(data.train.num_steps):
        batch = data.train.batch(step)
        assert {name: x.dtype for name, x in batch.items()} == {name: np.dtype(t) for name, t in FIELDS.items()}
        row = {name: x[0] for name, x in batch.items()}
        texts = texts_of(row)
        packed = max(packed, len(texts))
        assert len(texts) % 2 == 0
        for j in range(len(texts) // 2):  # segment 2j + 1 is chosen, 2j + 2 rejected
            (prompt, chosen), (same, rejected) = texts[2 * j : 2 * j + 2]
            assert prompt == same
            seen.append((prompt, chosen, rejected))
        assert (row["segments"][~row["mask"]] == 0).sum() == 64 - sum(len(BYTES.encode(a + b)) + 1 for a, b in texts)
    assert sorted(seen) == sorted(tuple(r.values()) for r in rows)
    assert seen != [tuple(r.values()) for r in rows]  # shuffled
    assert packed == data.slots == (2 if packing == "pad" else max(len(p) for p in data.train.sources[0].plan) * 2)
    # The held-out pairs, in order, the last batch filled up with padding.
    batches = list(eval_batches(data.heldout["h"], batch_size=4))
    texts = [texts_of({name: x[r] for name, x in b.items()}) for b in batches for r in range(4)]
    assert sum(map(len, texts)) == 2 * len(rows)
    assert [len(t) for t in texts[len(data.heldout["h"].plan) :]] == [0] * (-len(data.heldout["h"].plan) % 4)


def test_packing_saves_rows():
    rows = many()
    num_rows = {p: len(pipeline.build(config(rows, packing=p), BYTES).train.sources[0].plan) for p in ("pack", "pad")}
    assert num_rows["pad"] == len(rows)
    targets = sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) + 2 for r in rows)
    assert -(-targets // 64) <= num_rows["pack"] < len(rows)


def labelled(n: int) -> list[dict[str, object]]:
    return [{"prompt": f"<{i}>", "completion": f"c{i}", "label": i % 3 == 0} for i in range(n)]


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_mismatched_completion_is_another_rows(n):
    rows = labelled(n)
    found = corpus(rows, examples="responses_mismatched", bad_rows="skip")
    assert len(found) == 2 * n
    for i, row in enumerate(rows):
        other = rows[(i + 1) % n]
        own, mismatched = shown(found[2 * i]), shown(found[2 * i + 1])
        assert own == f"^{row['prompt']}" + "".join(f"[{c}]" for c in row["completion"]) + "[$]"
        assert mismatched == f"^{row['prompt']}" + "".join(f"[{c}]" for c in other["completion"]) + "[$]"
        assert own != mismatched
        assert found.labels[2 * i] == row["label"]
        assert found.origins[2 * i + 1] == f"memory:{i} with the completion of memory:{(i + 1) % n}"


def test_a_row_alone_has_no_other_completion():
    with pytest.raises(ValueError, match="expected at least 2 prompts, found 1"):
        corpus(labelled(1), examples="responses_mismatched")
    with pytest.raises(ValueError, match="expected at least 2 prompts, found 1"):  # the one that is left
        corpus([*labelled(1), {"prompt": "a"}], examples="responses_mismatched", bad_rows="skip")


def test_rows_left_out_are_not_borrowed_from():
    rows = [*labelled(2), {"prompt": "x", "completion": "y", "label": "bad"}, *labelled(3)[2:]]
    found = corpus(rows, examples="responses_mismatched", bad_rows="skip")
    assert [BYTES.decode(found[i].tokens[found[i].mask]) for i in (1, 3, 5)] == ["c1", "c2", "c0"]


def test_the_label_is_not_part_of_a_mismatch_by_document():
    a, b = (
        Document(np.array([1, 2, 3, t]), np.array([0, 0, m, 1], bool), np.array([0, 1, 1, 1]), f"f:{t}", label=True)
        for t, m in ((7, 0), (8, 1))
    )
    (_, first), (_, second) = with_mismatched([a, b])
    assert (first.tokens.tolist(), first.mask.tolist()) == ([1, 2, 3, 3, 8], [False, False, False, True, True])
    assert (second.tokens.tolist(), second.mask.tolist()) == ([1, 2, 7], [False, False, True])
    assert (len(first.target_bytes), first.label, second.label) == (5, False, False)


@pytest.mark.parametrize("examples", ["responses", "responses_mismatched"])
def test_labels_stand_in_the_batch_by_segment(examples):
    rows = labelled(11)
    cfg = config(rows, examples=examples, packing="pack", heldout=(SourceConfig("memory", rows=tuple(rows), name="h"),))
    data = pipeline.build(cfg, BYTES)
    step = 2 if examples == "responses_mismatched" else 1
    found = {}
    batches = [data.train.batch(i) for i in range(data.train.num_steps)]
    for batch in batches:
        assert batch["labels"].shape == (1, data.slots) and batch["labels"].dtype == np.bool_
        texts = texts_of({name: x[0] for name, x in batch.items()})
        found |= {prompt: bool(label) for (prompt, _), label in zip(texts[::step], batch["labels"][0, ::step])}
        assert not batch["labels"][0, len(texts) :].any()
        assert not batch["labels"][0, 1::step].any() or step == 1
    assert found == {row["prompt"]: row["label"] for row in rows}
    held = list(eval_batches(data.heldout["h"], batch_size=4))
    assert all(b["labels"].shape == (4, data.slots) for b in held)
    assert sum(b["labels"].sum() for b in held) == sum(row["label"] for row in rows)


def test_chosen_and_rejected_are_documents_by_themselves():
    rows = many(5)
    pairs = corpus(rows)
    for k, side in enumerate(("chosen", "rejected")):
        one = corpus(rows, examples=side)
        assert len(one) == 5 and config(rows, examples=side).group == 1
        for i in range(5):
            assert shown(one[i]) == shown(pairs[2 * i + k])
            assert one.origins[i] == f"memory:{i} {side}"


MESSAGE_ROWS = [
    {"chosen": [user(q), assistant("é" * len(q))], "rejected": [user(q), assistant("no")]} for q in ("q", "r?", "s")
]
FILE_ROWS = {"pairs": many(5), "messages": MESSAGE_ROWS, "responses_mismatched": labelled(5)}


@pytest.mark.parametrize("name", FILE_ROWS)
def test_files_give_the_same_rows_as_memory(name, tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    rows, examples = FILE_ROWS[name], "pairs" if name == "messages" else name
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    sources = {
        "memory": SourceConfig("memory", rows=tuple(rows)),
        "parquet": SourceConfig("parquet", path=str(tmp_path / "a.parquet")),
        "jsonl": SourceConfig("jsonl", path=str(tmp_path / "a.jsonl.gz")),
    }
    built = {
        kind: pipeline.build(config(train=(s,), examples=examples, chat_template=TEMPLATE, packing="pack"), BYTES)
        for kind, s in sources.items()
    }
    expected = built["memory"]
    assert len(expected.train.sources[0].corpus) == 2 * len(rows)
    for data in built.values():
        assert data.fingerprint == expected.fingerprint
        for step in range(expected.train.num_steps):
            got, want = data.train.batch(step), expected.train.batch(step)
            assert got.keys() == want.keys()
            for field in want:
                np.testing.assert_array_equal(got[field], want[field], err_msg=field)
    assert built["jsonl"].train.sources[0].corpus.origins[0].startswith(f"{tmp_path}/a.jsonl.gz:1")
    assert built["parquet"].train.sources[0].corpus.origins[0].startswith(f"{tmp_path}/a.parquet:0")


def test_the_cache_of_a_corpus_knows_what_its_rows_are(tmp_path):
    rows = [{**pair, **response} for pair, response in zip(many(4), labelled(4))]

    def built(examples):
        return corpus(rows, examples=examples, cache_dir=str(tmp_path))

    for examples in ("pairs", "chosen", "responses", "responses_mismatched"):
        first, again = built(examples), built(examples)
        plain = corpus(rows, examples=examples)
        for found in (first, again):
            assert found.fingerprint() == plain.fingerprint()
            np.testing.assert_array_equal(found.labels, plain.labels)
            assert list(found.origins) == list(plain.origins)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4


def test_a_label_changes_the_fingerprint():
    rows = labelled(3)
    changed = [rows[0] | {"label": not rows[0]["label"]}, *rows[1:]]
    prints = [pipeline.build(config(r, examples="responses"), BYTES).fingerprint for r in (rows, changed)]
    assert prints[0] != prints[1]


def test_real_pairs(shared_data: Path):
    path = shared_data / "hh_rlhf" / "harmless_base_a.jsonl.gz"
    if not path.is_file():
        pytest.skip("hh-rlhf is not on this machine")
    source = SourceConfig("jsonl", path=str(path))
    rows, marker = open_source(source), source.reply_marker
    assert len(rows) == 1912
    # Counts alone: a failing comparison of texts would print them.
    by_hand = collections.Counter(
        "good" if row["chosen"].rpartition(marker)[0] == row["rejected"].rpartition(marker)[0] else "different prompts"
        for row in (rows[i] for i in range(len(rows)))
    )
    assert by_hand == {"good": 1910, "different prompts": 2}
    cfg = config(train=(source,), sequence_length=1 << 14, packing="pack", bad_rows="skip")
    data = pipeline.build(cfg, BYTES)
    assert data.skipped == {"different prompts": 2}
    found = data.train.sources[0].corpus
    assert len(found) == 2 * 1910
    with pytest.raises(BadRow) as error:
        pipeline.build(config(train=(source,), sequence_length=1 << 14), BYTES)
    assert error.value.reason == "different prompts" and f"{path.name}:" in error.value.origin
    at, wrong = 0, collections.Counter()
    for i in range(len(rows)):
        texts = [rows[i][side].rpartition(marker) for side in ("chosen", "rejected")]
        if texts[0][0] != texts[1][0]:
            continue
        for k in (0, 1):
            document = found[at + k]
            first = int(np.argmax(document.mask))
            wrong["prompt"] += BYTES.decode(document.tokens[1:first]) != texts[k][0] + marker
            wrong["reply"] += BYTES.decode(document.tokens[first:-1]) != texts[k][2]
            wrong["end"] += document.tokens[-1] != BYTES.eos_id or document.tokens[0] != BYTES.bos_id
            wrong["mask"] += not document.mask[first:].all()
        at += 2
    assert at == len(found) and not +wrong
