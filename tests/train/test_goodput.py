"""Where the time of a run went: sums that add up, over stops and starts."""

from __future__ import annotations

import json

import pytest

from jaxlm.train.goodput import CLASSES, TimelineSink, account, read_timeline


def event(kind, time, step, **perf):
    return {"event": kind, "time": time, "step": step, "perf": perf}


def test_the_classes_add_up_to_the_time_and_lost_steps_do_not_count():
    events = [
        event("start", 100.0, 0),
        event("line", 130.0, 10, compile_s=12.0, steps_per_s=1.0, data_wait_s=2.0),  # 30 = 12 + 8 + 2 and 8 to begin
        event("line", 143.0, 20, checkpoint_s=3.0, steps_per_s=1.0),
        event("line", 153.0, 30, steps_per_s=1.0),  # killed after this, with a checkpoint of step 20
        event("start", 200.0, 20),
        event("line", 220.0, 30, compile_s=4.0, steps_per_s=1.0),
        event("line", 222.0, 30),  # an evaluation's, which says nothing of time
        event("line", 240.0, 40, eval_s=6.0, steps_per_s=1.0),
        event("end", 241.0, 40),
        event("start", 900.0, 40),  # it was finished already
        event("end", 900.5, 40),
    ]
    found = account(events)
    expected = {"compile": 16.0, "data": 2.0, "checkpoints": 3.0, "evaluation": 6.0, "redone": 10.0, "down": 47.0}
    expected |= {"start": 8.0 + 6.0, "steps": 8.0 + 10 + 10 + 10, "other": 4.0 + 1.0}
    assert found == pytest.approx(expected) and set(found) == set(CLASSES)
    assert sum(found.values()) == pytest.approx(241.0 - 100.0)
    assert account([]) == {} and sum(account(events[:1]).values()) == 0


def test_half_of_an_interval_may_be_thrown_away():
    events = [event("start", 0.0, 0), event("line", 20.0, 20, steps_per_s=1.0), event("start", 20.0, 15)]
    found = account([*events, event("line", 25.0, 20, steps_per_s=1.0)])
    assert found["redone"] == 5.0 and found["steps"] == 20.0


def test_the_file_only_grows_and_survives_a_kill(tmp_path):
    path = tmp_path / "run" / "timeline.jsonl"
    first = TimelineSink(path, step=0)
    first.write(5, {"train/loss": 1.0, "perf/steps_per_s": 2.0})
    first.close()
    path.write_text(path.read_text() + '{"event": "li')  # cut off
    again = TimelineSink(path, step=5)
    again.close()
    found = read_timeline(path)
    assert [(e["event"], e["step"]) for e in found] == [
        ("start", 0), ("line", 5), ("end", 5), ("start", 5), ("end", 5),
    ]  # fmt: skip
    assert found[1]["perf"] == {"steps_per_s": 2.0} and json.loads(path.read_text().splitlines()[0])["time"] > 1e9
    assert read_timeline(tmp_path / "none") == []
