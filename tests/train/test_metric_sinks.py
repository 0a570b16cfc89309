"""Metrics files, the console, and means."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest

from jaxlm.train.metrics import Console, JsonlSink, Mean, read_lines
from jaxlm.train.wandb import WandbSink


def write(path, steps, **options):
    sink = JsonlSink(path, **options)
    for step in steps:
        sink.write(step, {"train/loss": step / 3})
    sink.flush()
    sink.close()


def test_lines_are_out_as_soon_as_they_are_written(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(1, {"train/loss": 0.1 + 0.2, "perf/mfu": math.nan})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "train/loss": 0.30000000000000004, "perf/mfu": null}\n'
    sink.close()


def test_on_resume_later_lines_are_dropped_and_the_file_is_as_if_undisturbed(tmp_path):
    write(tmp_path / "whole.jsonl", [0, 10, 20, 30])
    write(tmp_path / "m.jsonl", [0, 10, 20])
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 25, "train/lo')  # killed while it wrote
    write(tmp_path / "m.jsonl", [20, 30], keep_through=10)
    assert (tmp_path / "m.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_line_cut_off_at_the_end_of_the_kept_part_is_dropped(tmp_path):
    write(tmp_path / "m.jsonl", [10])
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 2')
    write(tmp_path / "m.jsonl", [], keep_through=20)
    assert [line["step"] for line in read_lines(tmp_path / "m.jsonl")] == [10]


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path / "m.jsonl", [0, 10])
    write(tmp_path / "m.jsonl", [0])
    assert [line["step"] for line in read_lines(tmp_path / "m.jsonl")] == [0]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: expected one JSON object per line, found 'not json'"):
        read_lines(tmp_path / "m.jsonl")


def test_a_mean_that_was_saved_in_the_middle_is_the_same_to_the_last_bit():
    pairs = [{"loss": (0.1 * i, 1 / (i + 1)), "norm": (i**0.5, 1.0)} for i in range(20)]
    whole, first = Mean(), Mean()
    for pair in pairs:
        whole.add(pair)
    for pair in pairs[:7]:
        first.add(pair)
    second = Mean(json.loads(json.dumps(first.state())))
    for pair in pairs[7:]:
        second.add(pair)
    assert second.values() == whole.values()
    expected = sum(0.1 * i for i in range(20)) / sum(1 / (i + 1) for i in range(20))
    assert whole.values()["loss"] == pytest.approx(expected, rel=1e-14)


def test_what_has_no_weight_has_no_mean():
    mean = Mean()
    mean.add({"x": (0.0, 0.0)})
    assert math.isnan(mean.values()["x"])


VALUES = {
    "train/grad_norm": 0.5,
    "train/loss": 2.25,
    "train/learning_rate": 3e-4,
    "train/param_norm": 7.0,
    "train/num_skipped": 0,
    "perf/tokens_per_s": 12345.6,
    "perf/mfu": 0.413,
    "perf/rss_bytes": 1e9,
}


def test_in_a_log_one_plain_line_per_write_and_no_bar():
    stream = io.StringIO()
    console = Console(200, stream=stream)
    console.advance(1)
    console.advance(200)
    console.write(200, VALUES)
    console.write(200, {"eval/bits_per_byte": 2.0})
    console.message("done")
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 200/200  loss 2.250  grad_norm 0.500  learning_rate 3.00e-04  12,346 tokens/s  mfu 41.3%",
        "step 200/200  eval/bits_per_byte 2.000",
        "done",
    ]
    assert "\r" not in stream.getvalue()


def test_skipped_updates_are_shown_once_there_are_any():
    stream = io.StringIO()
    Console(9, stream=stream).write(9, {"train/loss": 1.0, "train/num_skipped": 2})
    assert stream.getvalue() == "step 9/9  loss 1.000  num_skipped 2\n"


def test_the_eta_leaves_out_the_first_step(monkeypatch):
    clock = iter([100.0, 120.0])
    monkeypatch.setattr("jaxlm.train.metrics.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    console = Console(31, start=10, stream=stream)
    console.advance(11)
    console.advance(21)
    console.write(21, {"train/loss": 1.0})
    assert stream.getvalue() == "step 21/31  loss 1.000  eta 00:20\n"  # ten steps in 20 s, ten to go


def test_on_a_terminal_a_bar_with_loss_speed_and_eta():
    stream = io.StringIO()
    console = Console(20, start=10, stream=stream, interactive=True)
    for step in range(11, 21):
        console.advance(step)
    console.write(20, VALUES)
    console.write(20, {"eval/loss": 3.0})
    console.close()
    last = stream.getvalue().replace("\n", "\r").split("\r")[-2]
    assert "20/20" in last and "loss 2.250  12,346 tokens/s" in last and "100%" in last
    assert "step 20/20  eval/loss 3.000" in stream.getvalue()


def test_weights_and_biases_go_on_with_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for start in range(2):
        sink = WandbSink("project", tmp_path / "run", {"seed": 1})
        ids.append(wandb.run.id)
        sink.write(start, {"train/loss": 1.5})
        sink.flush()
        sink.close()
    assert ids[0] == ids[1] and wandb.run is None
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="train.wandb_project='p' needs the package: pip install wandb"):
        WandbSink("p", tmp_path, {})
