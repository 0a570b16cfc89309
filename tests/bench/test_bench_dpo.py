"""The benchmark of DPO at a size where time means nothing: what it packs, checks, measures and writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from jaxlm.bench import dpo as bench

TINY = ["--width", "32", "--layers", "1", "--heads", "2", "--mlp-width", "64", "--vocab", "50", "--length", "64"]
TINY += ["--pairs", "3", "--rounds", "1"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


def arguments(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*TINY, *options])


def test_rows_hold_whole_pairs_and_pad_least_unless_told(tmp_path):
    problem = bench.make_problem(arguments(), tmp_path)
    rows = bench.packed(problem)
    packed = [(rows.corpus[p.document].tokens.tolist(), rows.corpus[p.document].mask.sum())
              for i in range(len(rows.plan)) for p in rows.pieces(i)]  # fmt: skip
    given = [(prompt + c, len(c)) for prompt, *both in problem.pairs for c in both]
    assert sorted(packed) == sorted(given)
    assert rows.length % 128 == 0 and len(bench.packed(problem._replace(row_length=512)).plan) == 1
    assert "3 pairs" in bench.layout(problem) and "6 rows" in bench.layout(problem)


@pytest.mark.slow
def test_a_command_without_a_rival_compares_the_two_references(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert bench.main(arguments("--no-memory", "--json", str(out))) == 0
    assert "of each other" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["seconds"].keys() == written["losses"].keys() == {"jaxlm", "jaxlm live"}
    assert all(len(values) == 2 for values in written["losses"].values())


def test_losses_that_are_not_those_of_dpo_are_an_error():
    same = [bench.math.log(2), 0.5]
    assert "within 0.0e+00" in bench.check({"jaxlm": same, "trl": same}, 1e-4)
    bench.check({"jaxlm": same, "trl": [same[0], 0.501]}, bench.TOLERANCE["bfloat16"])
    for bad in ([0.7, 0.5], [bench.math.log(2), 0.501], [float("nan"), 0.5]):
        with pytest.raises(ValueError, match="expected losses that agree to 0.0001"):
            bench.check({"jaxlm": same, "trl": bad}, bench.TOLERANCE["float32"])


def test_ligers_kernels_are_asked_for_where_they_can_run():
    assert bench.contestants(arguments("--versus", "trl")) == ["jaxlm", "jaxlm live", "trl", "trl precomputed"]
    for options in (["--liger"], ["--liger", "--versus", "trl"]):  # the tests have no GPU
        with pytest.raises(ValueError, match="--liger needs --versus trl and a GPU"):
            bench.contestants(arguments(*options))


def test_some_of_the_contestants_are_chosen_by_name():
    chosen = bench.contestants(arguments("--versus", "trl", "--only", "trl precomputed", "jaxlm"))
    assert chosen == ["jaxlm", "trl precomputed"]
    for names in (["jaxlm", "trl"], ["jaxlm live"]):
        with pytest.raises(ValueError, match="--only: expected jaxlm and some of jaxlm live; found"):
            bench.contestants(arguments("--only", *names))


@pytest.mark.slow
@needs_proc
def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    used = bench.alone(bench.peak_memory, bench.make_problem(arguments(), tmp_path), "jaxlm")
    assert used.keys() == {"a step", "in all"} and used["in all"] > max(0, used["a step"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_trl_computes_the_same(tmp_path, capsys):
    pytest.importorskip("trl")
    out = tmp_path / "out.json"
    assert bench.main(arguments("--versus", "trl", "--no-memory", "--json", str(out))) == 0
    printed = capsys.readouterr().out
    for pair in ("jaxlm / trl", "jaxlm / trl precomputed", "jaxlm live / trl"):
        assert f"{pair}: " in printed
    assert list(json.loads(out.read_text())["losses"]) == ["jaxlm", "jaxlm live", "trl", "trl precomputed"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trls_products_are_in_the_dtype_that_is_asked_for(tmp_path, monkeypatch, dtype):
    pytest.importorskip("trl")
    from transformers.models.llama import modeling_llama

    seen, forward = set(), modeling_llama.LlamaMLP.forward

    def recorded(self, x):
        out = forward(self, x)
        seen.add(str(out.dtype).removeprefix("torch."))
        return out

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", recorded)
    bench.trl_step(bench.make_problem(arguments("--dtype", dtype), tmp_path))()
    assert seen == {dtype}
