"""A run that is stopped anywhere and started again ends like one that never was: to the last bit."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.train.checkpoint import Checkpoints, all_steps
from jaxlm.train.preemption import Preempted

SCRIPT = Path(__file__).with_name("tiny_run.py")
TINY = runpy.run_path(str(SCRIPT))
tiny_run, Data, comparable = (TINY[name] for name in ("tiny_run", "Data", "comparable"))

MESHES = {"one": dict(num_devices=1), "eight": dict(num_devices=8), "sharded": dict(num_devices=8, fsdp=4)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """mesh -> (folder, result) of a run that nothing disturbs."""
    done = {}

    def run(mesh: str):
        if mesh not in done:
            folder = tmp_path_factory.mktemp(mesh)
            done[mesh] = folder, tiny_run(folder, **MESHES[mesh])
        return done[mesh]

    return run


def stop_at(folder: Path, step: int, **options) -> None:
    """Runs until the batch of `step` is asked for, where a signal comes: step + 1 is saved."""
    with pytest.raises(Preempted):
        tiny_run(folder, data=Data(before={step: lambda: signal.raise_signal(signal.SIGTERM)}), **options)


def assert_equal_states(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# Steps drawn once by hand: on and off the grids of lines (5), evaluations (8) and checkpoints (4), twice in a run too.
@pytest.mark.parametrize(
    "mesh, stops",
    [
        ("one", (2, 16)),
        ("sharded", (10,)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("one", (12,)), ("eight", (6,)), ("sharded", (0, 22)))
        ),
    ],
)
def test_bit_identical(tmp_path, whole, capsys, mesh, stops):
    for stop in stops:
        stop_at(tmp_path, stop, **MESHES[mesh])
    result = tiny_run(tmp_path, **MESHES[mesh])
    folder, expected = whole(mesh)
    assert f"resuming from step {stops[-1] + 1} of 24" in capsys.readouterr().out
    assert_equal_states(result.state, expected.state)
    assert comparable(tmp_path) == comparable(folder)


def test_bad_steps_are_remembered_over_a_stop(tmp_path):
    bad = (3, 6, 7, 8)
    for folder in ("whole", "stopped"):
        data = Data(bad)
        if folder == "stopped":
            data.before = {7: lambda: signal.raise_signal(signal.SIGTERM)}
            with pytest.raises(Preempted):
                tiny_run(tmp_path / folder, data=data, max_skipped_in_a_row=3)
        with pytest.raises(FloatingPointError, match="3 updates in a row"):
            tiny_run(tmp_path / folder, data=Data(bad), max_skipped_in_a_row=3)
    reports = [json.loads((tmp_path / folder / "nonfinite.json").read_text()) for folder in ("whole", "stopped")]
    assert reports[0] == reports[1]
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "stopped")


@pytest.mark.parametrize(
    "first, second",
    [
        ("one", "sharded"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sharded", "one"), ("eight", "sharded"))),
    ],
)
def test_another_device_count_goes_on_to_the_same_numbers(tmp_path, whole, first, second):
    stop_at(tmp_path, 13, **MESHES[first])
    result = tiny_run(tmp_path, **MESHES[second])
    _, expected = whole(first)
    for a, b in zip(jax.tree.leaves(jax.device_get(result.state)), jax.tree.leaves(jax.device_get(expected.state))):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(comparable(tmp_path), comparable(whole(first)[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


EIGHT_FOUR_TWO = [dict(num_devices=devices, fsdp=devices // 2) for devices in (8, 4, 2)]
SLICES = [dict(num_devices=4 * slices, fsdp=2, slices=slices) for slices in (2, 1)]


@pytest.mark.parametrize("meshes", [EIGHT_FOUR_TWO, SLICES], ids=["8, 4, 2 devices", "2, 1 slices"])
def test_on_fewer_and_fewer_devices_and_on_eight_again(tmp_path, whole, meshes):
    straight, expected = whole("sharded")
    for stop, mesh in zip((5, 11, 17), meshes):
        stop_at(tmp_path, stop, **mesh)
    result = tiny_run(tmp_path, **MESHES["sharded"])
    for a, b in zip(jax.tree.leaves(jax.device_get(result.state)), jax.tree.leaves(jax.device_get(expected.state))):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(comparable(tmp_path), comparable(straight), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def damage(folder: Path) -> None:
    """Changes a byte in the middle of the largest file, as a disk or a half-written copy does."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


# Orbax leaves coroutines unawaited when a read fails; that is its noise, not ours.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["a byte", "half of its files"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_is_used(tmp_path, whole, capsys, how):
    stop_at(tmp_path, 9)  # 10 is saved, and 8 before it
    newest = tmp_path / "checkpoints" / "10"
    if how == "a byte":
        damage(newest)
    else:
        for path in sorted(p for p in newest.rglob("*") if p.is_file() and p.name != "_CHECKPOINT_METADATA")[::2]:
            path.unlink()
    result = tiny_run(tmp_path)
    told = capsys.readouterr().out
    assert f"WARNING: checkpoint {newest} is damaged" in told and "resuming from step 8 of 24" in told
    gc.collect()  # here, where the noise is expected
    assert (tmp_path / "checkpoints" / "10.damaged").is_dir()
    assert_equal_states(result.state, whole("one")[1].state)
    assert comparable(tmp_path) == comparable(whole("one")[0])


def test_where_no_checkpoint_can_be_read_none_is_thrown_away(tmp_path):
    stop_at(tmp_path, 9)
    for step in (8, 10):
        damage(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="checkpoints/10 is damaged"):
        tiny_run(tmp_path)
    assert all_steps(tmp_path / "checkpoints") == [8, 10]


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(tmp_path, whole):
    calls = []

    def before_eval():
        calls.append(1)
        if len(calls) == 2:  # the evaluation at step 8
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted) as stopped:
        tiny_run(tmp_path, before_eval=before_eval)
    assert stopped.value.step == 8
    assert [line["step"] for line in comparable(tmp_path) if "eval/loss" in line] == [0]
    result = tiny_run(tmp_path)
    assert_equal_states(result.state, whole("one")[1].state)
    assert comparable(tmp_path) == comparable(whole("one")[0])


def test_the_best_checkpoint_is_kept_through_the_end(tmp_path):
    tiny_run(tmp_path, num_steps=16, best_metric="eval/loss", best_mode="max", keep_last=1)
    assert all_steps(tmp_path / "checkpoints") == [0, 16]


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path, whole, monkeypatch):
    def die(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", die)
        tiny_run(tmp_path)
    assert len(comparable(tmp_path)) == 1
    tiny_run(tmp_path)
    assert comparable(tmp_path) == comparable(whole("one")[0])


def child(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 12])
def test_a_kill_while_a_checkpoint_is_half_written(tmp_path, whole, step):
    width = 2048  # the save must take long enough to be hit
    killed = child(tmp_path / "run", "--kill-in-save-of", str(step), "--width", str(width))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "run" / "checkpoints"
    assert step not in all_steps(folder)
    assert [path.name for path in folder.iterdir() if path.name.startswith(f"{step}.")]
    resumed = child(tmp_path / "run", "--width", str(width))
    assert resumed.returncode == 0, resumed.stderr
    assert f"{step} was half written" in resumed.stderr
    assert (f"resuming from step {step - 4} of 24" in resumed.stdout) == (step > 0)
    undisturbed = child(tmp_path / "whole", "--width", str(width))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    saved = [
        json.loads((tmp_path / run / "checkpoints" / "24" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        for run in ("run", "whole")
    ]
    assert saved[0]["manifest"] == saved[1]["manifest"]  # a checksum for every leaf
    assert not [path for path in folder.iterdir() if not path.name.isdigit()]
