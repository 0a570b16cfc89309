"""Preference data beyond the single row: what is cut, how pairs lie in rows, mismatches, labels, files, the cache."""

from __future__ import annotations

import collections
import gzip
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import pipeline
from jaxlm.data.batch import FIELDS
from jaxlm.data.document import Document
from jaxlm.data.errors import BadRow
from jaxlm.data.fit import fit, shares
from jaxlm.data.loader import eval_batches
from jaxlm.data.preference import with_mismatched
from jaxlm.data.sources import SourceConfig, open_source

ROWS = runpy.run_path(str(Path(__file__).with_name("preference_rows.py")))
BYTES, TEMPLATE, user, assistant, config, corpus, shown, many = (
    ROWS[name] for name in ("BYTES", "TEMPLATE", "user", "assistant", "config", "corpus", "shown", "many")
)


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


def test_a_mismatched_completion_answers_another_prompt():
    """Labelled rows made from pairs come as two answers to each prompt, side by side."""
    rows = [{"prompt": f"<{i // 2}>", "completion": f"c{i}", "label": i % 2 == 0} for i in range(6)]
    found = corpus(rows, examples="responses_mismatched")
    for i, row in enumerate(rows):
        borrowed = BYTES.decode(found[2 * i + 1].tokens[found[2 * i + 1].mask])
        answers = {other["completion"] for other in rows if other["prompt"] == row["prompt"]}
        assert borrowed not in answers


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
