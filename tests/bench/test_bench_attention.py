"""The benchmark of attention at a size where time means nothing: what it compares, counts and writes."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from jaxlm.bench import attention as bench

TINY = ["--rows", "2", "--length", "128", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--rounds", "1"]


def arguments(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*TINY, *options])


@pytest.mark.parametrize("options", [[], ["--documents", "4"], ["--window", "20"]], ids=str)
def test_every_candidate_computes_the_same(options):
    problem = bench.make_problem(arguments(*options))
    lines = bench.measure(problem, "forward", rounds=1, truth=bench.exact(problem))
    assert [m.candidate for m in lines] == [bench.BASELINE, "reference", "blockwise"]
    assert max(m.max_error for m in lines) < 1e-5


def test_the_command_prints_a_table_and_writes_json_and_a_plot(tmp_path, capsys):
    out, drawn = tmp_path / "out.json", tmp_path / "out.png"
    assert bench.main(arguments("--json", str(out), "--plot", str(drawn))) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "length=128" in printed[0] and len(printed) == 2 + 2 * 3
    lines = json.loads(out.read_text())["measurements"]
    forward = lines[0]["tflop_per_s"] * lines[0]["time_s"]
    np.testing.assert_allclose(forward, 2 * 2 * 4 * 128**2 * 8 / 1e12)
    np.testing.assert_allclose(lines[3]["tflop_per_s"] * lines[3]["time_s"] / forward, 3.5)
    assert drawn.stat().st_size > 1000


def test_documents_that_do_not_divide_a_row_are_an_error():
    with pytest.raises(ValueError, match="--documents: expected a divisor of --length 128, found 3"):
        bench.make_problem(arguments("--documents", "3"))
