"""Traces of chosen steps, and of no others."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path

import pytest

from jaxlm.train.profile import ProfileConfig

tiny_run = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))["tiny_run"]


def names_in(trace: Path) -> list[str]:
    (path,) = trace.rglob("*.trace.json.gz")
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def test_consecutive_steps_make_one_trace_and_each_has_its_own_folder(tmp_path):
    tiny_run(tmp_path, num_steps=12, profile_steps=(3, 4, 9))
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["3", "9"]
    both, one = (sum("jit(step)" in name for name in names_in(tmp_path / "profile" / n)) for n in ("3", "9"))
    assert both == 2 * one > 0


def test_the_last_step_ends_its_trace(tmp_path):
    tiny_run(tmp_path, num_steps=4, profile_steps=(3,))
    assert names_in(tmp_path / "profile" / "3")


def test_a_step_before_the_first_is_refused():
    with pytest.raises(ValueError, match="profile.steps: expected steps of 0 or more, found"):
        ProfileConfig(steps=(-1,))
