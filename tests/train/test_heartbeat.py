"""Signs of life: a file that follows the steps, and the stacks of a process that hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from jaxlm.train import heartbeat
from jaxlm.train.config import TrainConfig
from jaxlm.train.heartbeat import Heartbeat


def test_the_file_follows_the_steps_but_not_too_closely(tmp_path, monkeypatch):
    beats = Heartbeat(tmp_path / "run", process=3, stall_s=None)
    path = tmp_path / "run" / "heartbeat-3.json"
    beats.beat(1)
    beats.beat(2)
    assert json.loads(path.read_text())["step"] == 1
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.0)
    beats.beat(3)
    found = json.loads(path.read_text())
    assert found["step"] == 3 and abs(found["time"] - time.time()) < 60
    beats.close()
    assert [p.name for p in path.parent.iterdir()] == ["heartbeat-3.json"]


def a_step_that_hangs():
    time.sleep(0.5)


def test_stacks_say_where_a_process_hangs_and_steps_that_come_leave_nothing(tmp_path):
    beats = Heartbeat(tmp_path, process=0, stall_s=0.2)
    a_step_that_hangs()
    beats.close()
    assert "in a_step_that_hangs" in (tmp_path / "stalled-0.txt").read_text()
    quick = Heartbeat(tmp_path / "quick", process=0, stall_s=5.0)
    for step in range(3):
        quick.beat(step)
    quick.close()
    time.sleep(0.01)
    assert not (tmp_path / "quick" / "stalled-0.txt").exists()


def test_a_watch_of_no_seconds_is_refused():
    with pytest.raises(ValueError, match="stall_s: expected a positive number of seconds or None, found 0"):
        TrainConfig(num_steps=1, stall_s=0)


def test_a_process_that_hangs_is_ended_where_its_launcher_is_to_start_it_again(tmp_path):
    code = "import time; from jaxlm.train.heartbeat import Heartbeat; "
    code += f"Heartbeat({str(tmp_path)!r}, process=0, stall_s=0.2, end=True); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], timeout=50)
    assert done.returncode == 1 and "time.sleep" not in (tmp_path / "stalled-0.txt").read_text().splitlines()[0]
    assert "Timeout" in (tmp_path / "stalled-0.txt").read_text()
