"""The loop's own promises: order, one compilation, stops, reports."""

from __future__ import annotations

import contextlib
import itertools
import json
import runpy
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.train.checkpoint import Checkpoints, all_steps
from jaxlm.train.evaluate import make_evaluate
from jaxlm.train.loop import TrainConfig, compile_ahead
from jaxlm.train.preemption import EXIT_CODE, Preempted, Preemption
from jaxlm.train.progress import Progress

TINY = runpy.run_path(str(Path(__file__).with_name("tiny_run.py")))
tiny_run, Data, comparable, make_train_step, loss_fn = (
    TINY[name] for name in ("tiny_run", "Data", "comparable", "make_train_step", "loss_fn")
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, tiny_run(folder)


def test_what_a_run_leaves_behind(whole):
    folder, result = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "heartbeat-0.json", "metrics.jsonl", "run.json", "tensorboard", "timeline.jsonl",
    ]  # fmt: skip
    assert all_steps(folder / "checkpoints") == [20, 24]
    assert result.step == int(result.state.step) == 24
    lines = comparable(folder)
    assert [(line["step"], "eval/loss" in line) for line in lines] == [
        (0, True), (5, False), (8, True), (10, False), (15, False), (16, True), (20, False), (24, False), (24, True)
    ]  # fmt: skip
    assert lines[-1]["eval/loss"] == result.metrics["eval/loss"] < 0.2 * lines[0]["eval/loss"]


def test_a_line_tells_speed_waiting_and_memory(whole):
    lines = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    first, second = [line for line in lines if "train/loss" in line][:2]
    assert first["perf/compile_s"] > 0 and "perf/compile_s" not in second
    for line in (first, second):
        assert line["perf/tokens_per_s"] == pytest.approx(32 * line["perf/steps_per_s"], rel=1e-12)
        assert line["perf/mfu"] == pytest.approx(line["perf/tokens_per_s"] * 6 * 32 * 16 / 1e12, rel=1e-12)
        assert line["perf/data_wait_s"] >= 0 and line["perf/rss_bytes"] > 1e8
    assert {name for name in second if name.startswith("train/")} == {
        "train/loss", "train/grad_norm", "train/update_norm", "train/param_norm", "train/num_skipped"
    }  # fmt: skip


def test_a_line_is_the_weighted_mean_since_the_line_before(whole, tmp_path):
    tiny_run(tmp_path, num_steps=10, log_every=1)
    every = [line["train/loss"] for line in comparable(tmp_path) if "train/loss" in line]
    fives = [line["train/loss"] for line in comparable(whole[0]) if "train/loss" in line]
    assert fives[:2] == pytest.approx([np.mean(every[:5]), np.mean(every[5:])], rel=1e-12)


def test_the_step_is_compiled_once_and_nothing_moves_between_host_and_device_unasked(tmp_path):
    traces = []
    step = make_train_step(loss_fn, TINY["make_optimizer"](), seed=0, ema_decay=0.9, dropout=True)

    def counted(state, batch):
        traces.append(1)
        return step(state, batch)

    with jax.transfer_guard("disallow"):
        tiny_run(tmp_path, step_fn=counted, num_devices=8, fsdp=2)
    assert len(traces) == 1


def test_the_state_is_donated(tmp_path):
    seen = []

    def keep(step_fn, state, batch):
        seen.append(state)
        return compile_ahead(step_fn, state, batch)

    tiny_run(tmp_path, num_steps=2, compile_step=keep)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(seen[0].params))


def test_without_jit_the_very_step_is_called():
    def step(state, batch):
        return state, {"total": (state.sum() * batch, 1.0)}

    state = jax.numpy.ones(3)
    compiled = compile_ahead(step, state, 2.0)
    assert compiled is not step and float(compiled(state, 2.0)[1]["total"][0]) == 6.0
    with jax.disable_jit():
        assert compile_ahead(step, jax.numpy.ones(3), 2.0) is step


def test_a_finished_run_says_so_and_asks_for_no_data(whole, capsys):
    folder, result = whole
    before = (folder / "metrics.jsonl").read_bytes()
    data = Data()
    again = tiny_run(folder, data=data)
    assert "already finished: step 24 of 24" in capsys.readouterr().out
    assert data.asked == []
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert again.metrics["eval/loss"] == result.metrics["eval/loss"]
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)


def test_fewer_steps_than_are_done_is_an_error(whole):
    with pytest.raises(ValueError, match="is at step 24, beyond num_steps=20"):
        tiny_run(whole[0], num_steps=20)


def test_another_config_is_refused_by_field(whole):
    with pytest.raises(ValueError, match=r"model\.depth: \(absent\) -> 3"):
        tiny_run(whole[0], config={"model": {"width": 16, "depth": 3}})


def test_harmless_changes_are_told(tmp_path, capsys):
    tiny_run(tmp_path, num_steps=4)
    tiny_run(tmp_path, num_steps=6, log_every=2)
    said = capsys.readouterr().out
    assert "resuming from step 4 of 6" in said
    assert "changed since that checkpoint: train.num_steps: 4 -> 6" in said
    assert "changed since that checkpoint: train.log_every: 5 -> 2" in said


def test_one_bad_batch_is_skipped_and_counted(tmp_path):
    result = tiny_run(tmp_path, num_steps=10, data=Data(bad=(6,)))
    assert int(result.state.num_skipped) == 1
    lines = [line for line in comparable(tmp_path) if "train/loss" in line]
    assert [line["train/num_skipped"] for line in lines] == [0, 1]
    assert np.isfinite(lines[1]["train/loss"])


def test_many_bad_batches_in_a_row_stop_the_run_and_are_written_down(tmp_path):
    data = Data(bad=(3, 6, 7, 8, 9, 10))
    with pytest.raises(FloatingPointError, match=r"3 updates in a row were skipped.*step 6"):
        tiny_run(tmp_path, data=data, max_skipped_in_a_row=3)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["last_good_step"] == 6
    assert [batch["step"] for batch in report["batches"]] == [6, 7, 8]
    assert report["batches"][0]["indices"] == list(range(48, 56))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_at_the_next_step(tmp_path, capsys, number):
    data = Data(before={6: lambda: signal.raise_signal(number)})
    handlers = signal.getsignal(number)
    with pytest.raises(Preempted) as stopped:
        tiny_run(tmp_path, data=data)
    assert (stopped.value.code, stopped.value.step) == (EXIT_CODE, 7) == (75, 7)
    assert all_steps(tmp_path / "checkpoints")[-1] == 7
    assert "stopped by a signal: step 7 is saved" in capsys.readouterr().out
    assert signal.getsignal(number) is handlers


def test_a_second_signal_is_not_swallowed():
    # A shell starts background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, before)
        preemption = stack.enter_context(Preemption())
        assert not preemption.asked()
        signal.raise_signal(signal.SIGINT)
        assert preemption.asked() and preemption.agreed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_data_that_ends_early_or_skips_is_an_error(tmp_path):
    data = Data()
    data.batches = lambda start, stop: Data().batches(start, 5)
    with pytest.raises(ValueError, match="asked for the batch of step 5 and gave none"):
        tiny_run(tmp_path / "a", data=data)
    data.batches = lambda start, stop: Data().batches(start + 2, stop)
    with pytest.raises(ValueError, match="asked for the batch of step 0 and gave 2"):
        tiny_run(tmp_path / "b", data=data)


def test_a_save_that_failed_stops_the_run(tmp_path, monkeypatch):
    finish = Checkpoints._finish

    def fail_at_8(self, step, response, score, start):
        finish(self, step, response, score, start)
        if step == 8:
            raise OSError("no space left on the device")

    monkeypatch.setattr(Checkpoints, "_finish", fail_at_8)
    with pytest.raises(RuntimeError, match=r"could not be saved.*no space left") as error:
        tiny_run(tmp_path)
    assert isinstance(error.value.__cause__, OSError)
    assert comparable(tmp_path)[-1]["step"] < 16  # not at the end of the run


def test_the_best_metric_must_be_one_that_is_evaluated(tmp_path):
    with pytest.raises(ValueError, match=r"best_metric: expected one of \['eval/loss'\], found 'eval/los'"):
        tiny_run(tmp_path, best_metric="eval/los")


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="log_every: expected at least 1, found 0"):
        TrainConfig(num_steps=5, log_every=0)


def test_evaluation_adds_totals_and_weights_over_all_batches():
    batches = [{"x": np.arange(4.0), "w": np.ones(4)}, {"x": np.array([10.0, 7, 7, 7]), "w": np.array([1.0, 0, 0, 0])}]
    calls = []

    def step(params, batch):
        calls.append(1)
        return {"x": (params * (batch["x"] * batch["w"]).sum(), batch["w"].sum())}

    sets = {"a": lambda: batches, "b": lambda: batches[:1]}
    evaluate = make_evaluate(step, sets, place=jax.device_put, params_of=abs)
    assert evaluate(-2.0, lambda: False) == {"a/x": 2 * 16 / 5, "b/x": 2 * 6 / 4}
    assert len(calls) == 1
    assert evaluate(-2.0, lambda: True) is None
    with pytest.raises(ValueError, match="evaluation set 'none': expected at least one batch"):
        make_evaluate(step, {"none": list}, place=jax.device_put, params_of=abs)(1.0, lambda: False)


def test_stdout_is_where_a_run_speaks(tmp_path, capsys):
    tiny_run(tmp_path, num_steps=1)
    out, err = capsys.readouterr()
    assert "compiled the training step in" in out and "step 1/1  loss" in out
    assert sys.stdout.isatty() or "\r" not in out + err


def test_rows_left_out_stand_in_every_line():
    lines = []
    progress = Progress(
        log_every=1, num_steps=2, constants={"data/empty": 2.0}, advance=lambda step: None,
        write=lambda step, values: lines.append((step, values["data/empty"])), on_skipped=lambda steps: None,
    )  # fmt: skip
    for step in (1, 2):
        progress.push(step, {"loss": (jax.numpy.ones(()), jax.numpy.ones(()))})
    progress.drain()
    assert lines == [(1, 2.0), (2, 2.0)]


def test_a_signal_before_the_first_step_of_a_resumed_run_is_not_missed(monkeypatch):
    """As the coordination service has it: the stop is at one more than the largest number passed before, or than 0."""
    passed = [0]

    def reached(number):
        passed.append(number)
        return number == stop_at

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jaxlm.train.preemption.multihost_utils.reached_preemption_sync_point", reached)
    monkeypatch.setattr("jaxlm.train.preemption._CALLS", itertools.count(1))
    stop_at = max(passed) + 1
    assert Preemption().agreed()
    stop_at = max(passed) + 1  # in the next stage of the same process
    assert Preemption().agreed()
