"""The benchmark of the hot path at a size where time means nothing: what it counts, compares and writes."""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np
import pytest

from jaxlm.bench import interleave as timing
from jaxlm.bench import token_stats as bench


def test_candidates_take_turns_in_a_rotating_order():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleave(candidates, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(s >= 0 for seconds in times.values() for s in seconds)


@pytest.mark.parametrize("bad", [{"candidates": {}, "rounds": 1}, {"candidates": {"a": int}, "rounds": 0}])
def test_nothing_to_measure_is_an_error(bad):
    with pytest.raises(ValueError, match="at least one round and one candidate"):
        timing.interleave(**bad)


def test_an_unknown_baseline_is_an_error():
    with pytest.raises(ValueError, match="unknown baseline 'c': expected one of a, b"):
        timing.speedups({"a": [1.0], "b": [1.0]}, baseline="c")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_candidate_computes_the_same(dtype):
    problem = bench.make_problem(num_tokens=16, width=8, vocab=600, dtype=dtype)
    truth = bench.exact(problem, rows=16)
    for direction in ("forward", "forward+backward"):
        lines = bench.measure(problem, direction, rounds=1, truth=truth)
        assert [m.candidate for m in lines] == list(bench.candidates(problem))
        assert max(m.max_error for m in lines) < 2e-6
        assert lines[0].speedup == 1 and lines[0].temp_ratio == 1


def test_gradients_are_those_of_the_sum():
    problem = bench.make_problem(num_tokens=4, width=8, vocab=60, dtype="float32")
    grads = [jax.jit(bench.with_gradients(bench.CANDIDATES[name]))(*problem)[1] for name in ("log_softmax", "tiled")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), *grads)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    out = tmp_path / "out.json"
    options = ["--tokens", "4", "--width", "8", "--vocab", "50", "--rounds", "1", "--json", str(out)]
    options += ["--only", "tiled", "optax", "--plot", str(tmp_path / "out.png")]
    assert bench.main(parser.parse_args(options)) == 0
    table = capsys.readouterr().out.splitlines()
    assert "vocab=50" in table[0] and len(table) == 2 + 2 * 3
    written = json.loads(out.read_text())
    lines = written["measurements"]
    assert written["vocab"] == 50 and [m["candidate"] for m in lines] == 2 * [bench.BASELINE, "optax", "tiled"]
    assert all(m["peak_share"] > 0 for m in lines)
    ratio = lines[2]["tflop_per_s"] * lines[2]["time_s"] / (lines[0]["tflop_per_s"] * lines[0]["time_s"])
    np.testing.assert_allclose(ratio, 1)
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_an_unknown_candidate_is_an_error_before_anything_is_measured():
    problem = bench.make_problem(num_tokens=2, width=8, vocab=8, dtype="float32")
    with pytest.raises(ValueError, match="--only: expected some of log_softmax, .*; found tild"):
        bench.candidates(problem, ["tiled", "tild"])


def test_rivals_of_a_gpu_are_refused_without_one_before_anything_is_measured():
    from jaxlm.bench import token_stats_torch

    with pytest.raises(ValueError, match="--versus torch (compares on a GPU|needs PyTorch)"):
        token_stats_torch.check_available()


def test_what_has_no_kernel_is_not_compiled_for():
    from jaxlm.bench import ahead

    with pytest.raises(ValueError, match="--compile-for cpu:8: expected a TPU or a GPU"):
        next(ahead.compile_for("cpu:8", num_tokens=8, width=8, vocab=8))
