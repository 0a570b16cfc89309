"""A run's checkpoints and small files in a bucket: an emulated one, on loopback, since a real one costs money."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils import epath

from jaxlm.cli import main
from jaxlm.recipes.load import load_model
from jaxlm.train.bucket import Copies, folder, home, on_this_machine
from jaxlm.train.checkpoint import Checkpoints, all_steps, load_newest
from jaxlm.train.config import TrainConfig
from jaxlm.train.metrics import read_lines
from jaxlm.train.state import new_state

ROOT = Path(__file__).parents[2]
emulated = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gcsfs", "gcp_storage_emulator")),
    reason="needs gcsfs and gcp-storage-emulator (the parity extra)",
)


def test_a_home_is_a_folder_or_one_in_the_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert home("runs/a", None) == epath.Path(tmp_path / "runs/a")
    monkeypatch.setitem(sys.modules, "gcsfs", sys)
    assert str(home("runs/a", "gs://name/prefix/")) == "gs://name/prefix/runs/a"
    assert str(home("/runs/a/", "gs://name")) == "gs://name/runs/a"


@pytest.mark.parametrize("bucket, told", [("s3://name", "only gs:// can be written"), ("name", "expected gs://name")])
def test_what_is_no_bucket_is_refused(bucket, told):
    with pytest.raises(ValueError, match=told):
        home("runs/a", bucket)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[gcs\]'"):
        folder("gs://name/runs")


def test_a_run_folder_in_a_bucket_is_refused(capsys):
    command = ["train", "--config", str(ROOT / "configs/quickstart.py"), "--config.run_dir=gs://name/runs"]
    assert main(command) != 0
    assert "set train.bucket" in capsys.readouterr().err


def test_small_files_are_copied_and_brought_back(tmp_path):
    here, there, new = tmp_path / "here", epath.Path(tmp_path / "there"), tmp_path / "new"
    (here / "checkpoints" / "1").mkdir(parents=True)
    (here / "tokenizer").mkdir()
    there.mkdir()
    (there / "tokenizer").mkdir()  # which a bucket makes by itself
    (there / "checkpoints").mkdir()
    files = {"run.json": "{}", "metrics.jsonl": "1\n", "tokenizer/t.json": "[]"}
    for name, text in (files | {"checkpoints/1/data": "large", "run.part": ""}).items():
        (here / name).write_text(text)
    copies = Copies(here, there)
    copies.update()
    assert {str(p.relative_to(there)) for p in tmp_path.glob("there/**/*") if p.is_file()} == set(files)
    (there / "run.json").unlink()
    (here / "metrics.jsonl").write_text("1\n2\n")
    copies.update()
    assert not (there / "run.json").exists(), "what has not changed is not copied again"
    new.mkdir()
    (new / "metrics.jsonl").write_text("1\n")
    back = Copies(new, there).bring_back()
    assert sorted(map(str, back)) == ["metrics.jsonl", "tokenizer/t.json"]
    assert (new / "metrics.jsonl").read_text() == "1\n2\n" and not (new / "checkpoints").exists()
    (new / "metrics.jsonl").write_text("1\n2\n3\n")
    assert not Copies(new, there).bring_back(), "what is longer here stays"


@pytest.fixture(scope="module")
def bucket():
    """The address of an empty bucket; what leads to it stays set, since the process keeps its clients."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://127.0.0.1:{server._api._httpd.server_port}"
    os.environ |= {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "gs://bucket"
    server.stop()


@emulated
def test_checkpoints_in_a_bucket(bucket, caplog):
    at = f"{bucket}/states"
    state = new_state({"w": jax.random.normal(jax.random.key(0), (16, 8))}, optax.adamw(1e-3), ema=False)
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(at, keep_last=2, best_metric="loss")
        for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
            checkpoints.save(step, state.replace(step=jax.numpy.int32(step)), metrics={"loss": loss})
        checkpoints.close()
        assert all_steps(at) == [1, 3, 4]
        # A save that was killed, and an array that was damaged.
        (epath.Path(at) / "3" / "_CHECKPOINT_METADATA").unlink()
        assert all_steps(at) == [1, 4]
        target = jax.eval_shape(lambda: state)
        damaged = max(epath.Path(at).glob("4/params/d/*"), key=lambda path: path.stat().length)
        damaged.write_bytes(bytes(reversed(damaged.read_bytes())))
        found = load_newest(at, target, check=lambda saved: None)
        assert found.step == 1 and "4 is damaged" in found.set_aside[0] and all_steps(at) == [1]
        np.testing.assert_array_equal(found.state.params["w"], state.params["w"])
        Checkpoints(at).close()
    assert "step 3 was half written" in caplog.text
    assert sorted(path.name for path in epath.Path(at).iterdir()) == ["1", "4"], "what was damaged can be looked at"


@emulated
@pytest.mark.slow
def test_machines_that_go_lose_nothing(bucket, tmp_path):
    """Two processes of two devices train; their disk goes; one process goes on, and ends with the numbers
    of a run that nothing happened to."""
    settings = "train.log_every=1 train.checkpoint_every=2 train.best_metric=None optim.warmup_steps=2 "
    settings += "optim.schedule=constant data.heldout=() baselines=() sample_prompts=() data.batch_size=8 "
    settings += "data.sequence_length=64 model.num_layers=1"
    common = ["train", "--config", str(ROOT / "configs/quickstart.py"), *(f"--config.{x}" for x in settings.split())]
    kept = [f"--config.train.bucket={bucket}/jobs", "--config.run_dir=runs/a"]
    pod = [sys.executable, str(ROOT / "launch/local_pod.py"), "--processes", "2", "--devices", "2", "--"]

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    alone = [sys.executable, "-m", "jaxlm.cli"]
    run(*pod, *common, *kept, "--config.train.num_steps=4", "--config.mesh.fsdp=4")
    shutil.rmtree(tmp_path / "runs")
    run(*alone, *common, *kept, "--config.train.num_steps=6")
    run(*alone, *common, "--config.run_dir=runs/b", "--config.train.num_steps=6")
    there, want = (read_lines(tmp_path / "runs" / name / "metrics.jsonl") for name in "ab")
    losses = [[(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] for lines in (there, want)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "runs/a/checkpoints").exists()
    with on_this_machine(f"{bucket}/jobs/runs/a") as copy:
        assert (copy / "loss.png").stat().st_size > 1000
    got, plain = load_model(f"{bucket}/jobs/runs/a"), load_model(tmp_path / "runs/b")
    assert got.origin == f"{bucket}/jobs/runs/a"
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_run_does_not_begin_anew_because_it_is_told_of_a_bucket(tmp_path, monkeypatch):
    from jaxlm.train import run as module

    for name in ("1", "2"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    monkeypatch.setattr(module, "all_steps", lambda path: [1, 2])
    run = module.Run.__new__(module.Run)
    run._cfg, run._dir = TrainConfig(num_steps=3, bucket="gs://name"), tmp_path
    with pytest.raises(ValueError, match="copy that folder there"):
        run._copies(epath.Path("gs://name/x"), resumed=False)
