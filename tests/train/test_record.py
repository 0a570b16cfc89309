"""The run record, and what may change on resuming."""

from __future__ import annotations

import json

import jax
import pytest

from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.record import check_resumable, make_record, versions, write_record

CONFIG = {"train": {"num_steps": 10, "seed": 1}, "model": {"width": 8, "windows": (1, None)}, "mesh": {"data": 1}}


def test_a_record_says_what_ran_where(tmp_path):
    record = make_record(CONFIG, mesh=make_mesh(MeshConfig(fsdp=4)), data_fingerprint="abc", flop_definition="6 N")
    found = json.loads(write_record(tmp_path, record, step=0).read_text())
    assert found["config"]["model"]["windows"] == [1, None]
    assert found["versions"]["jax"] == jax.__version__
    assert found["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert found["platform"]["num_devices"] == 8 and found["platform"]["backend"] == "cpu"
    assert (found["data_fingerprint"], found["flop_definition"], found["from_step"]) == ("abc", "6 N", 0)


def test_every_start_is_kept_and_a_new_run_begins_a_new_record(tmp_path):
    for step in (0, 4, 8):
        write_record(tmp_path, {"config": step}, step=step)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["from_step"] == 8 and [start["from_step"] for start in found["earlier"]] == [0, 4]
    write_record(tmp_path, {"config": 0}, step=0)
    assert json.loads((tmp_path / "run.json").read_text())["earlier"] == []


def test_versions_name_python_and_leave_out_what_is_not_installed():
    found = versions()
    assert {"python", "jaxlm", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint"} <= set(found)
    assert all(isinstance(version, str) for version in found.values())


def test_an_equal_config_resumes_also_after_a_trip_through_json():
    assert check_resumable(json.loads(json.dumps(CONFIG)), CONFIG) == []


def test_fields_that_change_earlier_numbers_are_named():
    changed = {**CONFIG, "model": {"width": 16}, "train": {"num_steps": 20, "seed": 2}, "data": {"new": 1}}
    with pytest.raises(ValueError) as error:
        check_resumable(CONFIG, changed)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert "model.width: 8 -> 16" in lines
    assert "train.seed: 1 -> 2" in lines
    assert "model.windows: [1, None] -> (absent)" in lines
    assert "data.new: (absent) -> 1" in lines
    assert not [line for line in lines if "num_steps" in line]


def test_harmless_fields_are_reported():
    changed = {**CONFIG, "train": {"num_steps": 20, "seed": 1}, "mesh": {"data": 8}}
    assert check_resumable(CONFIG, changed) == ["train.num_steps: 10 -> 20", "mesh.data: 1 -> 8"]
    with pytest.raises(ValueError, match=r"mesh\.data: 1 -> 8"):
        check_resumable(CONFIG, changed, may_change=("*num_steps",))
