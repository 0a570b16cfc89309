"""Several real processes on this machine: one process's numbers, and nothing lost when they are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxlm.cli import main
from jaxlm.recipes import pod, runtime
from jaxlm.train.metrics import read_lines

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, str(ROOT / "launch" / "local_pod.py")]


def test_a_dry_run_prints_one_line_per_process():
    command = [*LAUNCH, "--processes", "2", "--devices", "3", "--dry-run", "--", "train", "--config", "a b.py"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2 and all("JAX_NUM_PROCESSES=2" in x and "JAX_NUM_CPU_DEVICES=3" in x for x in lines)
    assert ["JAX_PROCESS_ID=0" in lines[0], "JAX_PROCESS_ID=1" in lines[1], lines[0].endswith("'a b.py'")] == [True] * 3


def test_what_is_missing_is_said(capsys):
    with pytest.raises(SystemExit):
        pod.main(["--processes", "0", "--", "train"])
    assert "at least one process" in capsys.readouterr().err


def test_a_process_that_fails_stops_the_others():
    running = pod.start(
        [sys.executable, "-c", "import os, time; time.sleep(60 * int(os.environ['JAX_PROCESS_ID'] == '0')); 1 / 0"],
        processes=2,
        devices=1,
    )
    assert pod.wait(running, grace=0.2) == 1  # process 0 sleeps, and is killed
    assert running[0].returncode == -9


def test_a_process_that_does_not_stop_is_killed():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    running = pod.start([sys.executable, "-c", code], processes=2, devices=1)
    assert pod.wait(running, grace=30, stopped=[time.monotonic()], stop_grace=0.2) == -9
    assert [process.returncode for process in running] == [-9, -9]


def test_several_processes_are_told_by_the_environment(monkeypatch):
    for name in runtime._SEVERAL:
        monkeypatch.delenv(name, raising=False)
    assert not runtime.several_processes()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not runtime.several_processes()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    assert runtime.several_processes()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    assert runtime.several_processes()
    with pytest.raises(ValueError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"):
        runtime.join()


def test_a_host_with_tpus_asks_for_the_others(tmp_path, monkeypatch, capsys):
    assert not runtime.on_tpu(tmp_path)
    for name, vendor in (("0000:00:04.0", "0x1af4"), ("0000:00:05.0", runtime.GOOGLE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        assert runtime.on_tpu(tmp_path)
        jax.config.update("jax_platforms", "cpu")
        assert not runtime.on_tpu(tmp_path)
    finally:
        jax.config.update("jax_platforms", before)
    for name in runtime._SEVERAL:
        monkeypatch.delenv(name, raising=False)

    def none_found(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", none_found)
    runtime.join()
    assert "the only one" in capsys.readouterr().out
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    with pytest.raises(ValueError, match="coordinator_address"):
        runtime.join()


@pytest.mark.parametrize("devices", [1, 2])
def test_programs_of_several_cpu_devices_are_not_kept(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        runtime.configure(runtime.Runtime())
        assert jax.config.jax_enable_compilation_cache == (devices == 1)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    settings = "train.num_steps=6 train.log_every=2 train.eval_every=3 train.checkpoint_every=3 optim.warmup_steps=2 "
    settings += "data.batch_size=8 sample_prompts=() mesh.fsdp=4"
    settings += " model.num_layers=2 model.scan_layers=True data.sequence_length=64 data.eval_batch_size=256"
    common = ["train", "--config", str(ROOT / "configs/quickstart.py"), *(f"--config.{x}" for x in settings.split())]
    several = [*LAUNCH, "--processes", "2", "--devices", "2", "--", *common, f"--config.run_dir={tmp_path / 'several'}"]
    subprocess.run(several, check=True, capture_output=True, timeout=300)
    alone = [*common, f"--config.run_dir={tmp_path / 'one'}", "--simulate-devices", "4"]
    subprocess.run([sys.executable, "-m", "jaxlm.cli", *alone], check=True, capture_output=True, timeout=300)
    one, two = (list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "several"))
    assert len(one) == len(two) > 3
    for a, b in zip(one, two):
        losses = [name for name in a if name.endswith(("loss", "bits_per_byte"))]
        assert losses and all(b[name] == pytest.approx(a[name], rel=1e-5) for name in losses)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_parameters(tmp_path):
    out = tmp_path / "chaos.json"
    assert main(["bench", "chaos", "--kills", "2", "--steps", "40", "--seed", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["same"] and found["kills"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone says which cores a process may use")
def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 1, 2, 3, 0})
    assert [pod._share_of_cores(i, 2) for i in range(2)] == [[0, 1], [2, 3]]
    assert pod._share_of_cores(0, 1) == [] and pod._share_of_cores(5, 6) == []
