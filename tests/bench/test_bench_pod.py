"""Several processes against one, at a size where time means nothing: both run, and their readings are compared."""

from __future__ import annotations

import argparse
import json
import statistics

import pytest

from jaxlm.bench import pod as bench


def arguments(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*options])


@pytest.mark.slow
def test_both_run_and_are_compared(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--rounds", "1", "--steps", "16", "--rows", "2", "--width", "32", "--json", str(out)]
    assert bench.main(arguments(*options)) == 0
    found = json.loads(out.read_text())
    speeds = {name: statistics.median(readings) for name, readings in found["tokens_per_s"].items()}
    assert [len(readings) for readings in found["tokens_per_s"].values()] == [2, 2]
    assert found["ratio"] == pytest.approx(speeds["2"] / speeds["1"])
    assert "2 processes / 1 process: " in capsys.readouterr().out


def test_too_few_steps_are_an_error():
    with pytest.raises(ValueError, match="--steps: expected at least 12, found 8"):
        bench.main(arguments("--steps", "8"))
