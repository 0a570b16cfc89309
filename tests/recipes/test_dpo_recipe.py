"""Whole runs of the preference recipe: first evaluations, learning, adapters, moving references, resuming, devices."""

from __future__ import annotations

import json
import math
import runpy
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.data.loader import Loader
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.recipes import dpo, wiring
from jaxlm.recipes.preference_losses import LossTerm
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.checkpoint import load_record
from jaxlm.train.preemption import Preempted

SETUP = runpy.run_path(str(Path(__file__).with_name("dpo_setup.py")))
MODEL, LORA, STEPS, config, compile_cache, one_device = (
    SETUP[name] for name in ("MODEL", "LORA", "STEPS", "config", "compile_cache", "one_device")
)
LOG_2 = float(np.float32(math.log(2)))


def lines_of(cfg: dpo.Config) -> list[dict[str, Any]]:
    """The lines of a run's metrics without times and memory."""
    text = (Path(cfg.run_dir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: x for name, x in line.items() if not name.startswith("perf/")} for line in lines]


def curve(cfg: dpo.Config, name: str) -> list[float]:
    return [line[name] for line in lines_of(cfg) if name in line]


KTO = dict(losses=(LossTerm("kto"),), data=dict(examples="responses_mismatched"))
RUNS: dict[str, dict[str, Any]] = {
    "cached": dict(),
    "live": dict(reference="live"),
    "lora_cached": dict(lora=LORA),
    "lora_live": dict(lora=LORA, reference="live"),
    "sync_every": dict(reference="live", sync_every=2, sync_weight=1.0),
    "kto": KTO,
    "simpo": dict(losses=(LossTerm("simpo", options=dict(beta=2.0, gamma=0.5)),)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """name -> (config, result) of a run that nothing disturbs, made once."""
    done = {}

    def run(name: str):
        if name not in done:
            cfg = config(tmp_path_factory.mktemp(name) / "run", **RUNS[name])
            done[name] = cfg, dpo.run(cfg)
        return done[name]

    return run


def manifest(cfg: dpo.Config, step: int = STEPS) -> set[str]:
    return set(load_record(Path(cfg.run_dir) / "checkpoints", step)["manifest"])


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["cached", *slow("live", "lora_live", "lora_cached")])
def test_dpo_starts_at_log_2_and_learns(whole, name):
    cfg, result = whole(name)
    evaluated, trained = curve(cfg, "h/loss"), curve(cfg, "train/loss")
    assert evaluated[0] == LOG_2
    first = lines_of(cfg)[0]
    assert first["step"] == 0
    for metric in ("margins", "rewards_chosen", "rewards_rejected", "accuracies", "ordered", "displacement_chosen"):
        assert first[f"h/{metric}"] == 0.0, metric
    assert trained[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(trained) == STEPS and len(evaluated) == STEPS + 1
    assert trained[-1] < 0.9 * trained[0] and evaluated[-1] < 0.9 * evaluated[0]
    assert result.metrics["h/loss"] == evaluated[-1] and result.metrics["h/pairs"] == 2
    assert (Path(cfg.run_dir) / "reference").is_dir() == (cfg.reference == "cached")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "lora_"])
def test_cached_and_live_references_give_the_same_numbers(whole, kind):
    lines = [lines_of(whole(f"{kind}{name}")[0]) for name in ("cached", "live")]
    assert len(lines[0]) == 2 * STEPS + 1
    for a, b in zip(*lines, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-5)  # displacements: differences of sums of 40 nats
        for loss in ("h/loss", "train/loss"):
            assert a.get(loss, 0.0) == pytest.approx(b.get(loss, 0.0), abs=1e-6)


@pytest.mark.slow
def test_checkpoints_of_adapters_hold_adapters_alone(whole):
    cfg, result = whole("lora_live")
    saved = {leaf for leaf in manifest(cfg) if not leaf.startswith("counters/")}
    assert {leaf for leaf in saved if leaf.startswith("params/")}
    for leaf in saved - {leaf for leaf in saved if leaf.endswith("/count")}:
        assert leaf.endswith(("/lora_a", "/lora_b")), leaf
    full = {leaf for leaf in manifest(whole("cached")[0]) if leaf.startswith("params/")}
    assert "params/embed/table" in full and not any("lora" in leaf for leaf in full)
    # What a user gets in the end is the whole model, adapters merged.
    merged = specs.flatten(dpo.final_params(cfg, result))
    assert set(merged) == {leaf.removeprefix("params/") for leaf in full}
    start = specs.flatten(dpo.start(cfg, decoder.spec(MODEL), make_mesh(MeshConfig(), jax.devices()[:1])))
    for path, x in start.items():
        assert bool((merged[path] != x).any()) == path.endswith("/kernel"), path


@pytest.mark.slow
def test_frozen_parameters_are_saved_only_where_they_move(whole):
    assert not any(leaf.startswith("frozen/") for leaf in manifest(whole("lora_live")[0]))
    assert any(leaf.startswith("frozen/") for leaf in manifest(whole("sync_every")[0]))


def test_the_reference_follows_the_policy(whole):
    """With sync_weight 1 the reference becomes the policy at every second update: the loss is log 2 again."""
    cfg, result = whole("sync_every")
    at_log_2 = [loss == LOG_2 for loss in curve(cfg, "h/loss")]
    assert at_log_2 == [True, False] * (STEPS // 2) + [True]
    jax.tree.map(np.testing.assert_array_equal, result.state.frozen, result.state.params)


@pytest.mark.slow
def test_the_reference_moves_by_its_weight(tmp_path):
    cfg = config(tmp_path, reference="live", sync_every=2, sync_weight=0.25, train=dict(num_steps=3))
    result = dpo.run(cfg)
    two = dpo.run(config(tmp_path / "two", reference="live", train=dict(num_steps=2)))
    start = dpo.start(cfg, decoder.spec(MODEL), make_mesh(MeshConfig(), jax.devices()[:1]))
    expected = jax.tree.map(lambda p, r: 0.25 * p + 0.75 * r, two.state.params, start)
    for a, b in zip(jax.tree.leaves(result.state.frozen), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def stop_in(monkeypatch, cfg: dpo.Config, step: int) -> None:
    """Runs until the batch of `step` is asked for, where a signal comes: step + 1 is saved."""
    checked = Loader._checked

    def batch(self, asked):
        if asked == step:
            signal.raise_signal(signal.SIGTERM)
        return checked(self, asked)

    with monkeypatch.context() as patch, pytest.raises(Preempted) as stopped:
        patch.setattr(Loader, "_checked", batch)
        dpo.run(cfg)
    assert stopped.value.step == step + 1


@pytest.mark.parametrize("name", ["cached", *slow("sync_every", "live", "lora_live", "kto")])
def test_resumed_to_the_last_bit(whole, tmp_path, monkeypatch, capsys, name):
    expected, result = whole(name)
    cfg = config(tmp_path, **RUNS[name])
    stop_in(monkeypatch, cfg, 2)  # in the middle between two synchronisations
    capsys.readouterr()
    resumed = dpo.run(cfg)
    said = capsys.readouterr().out
    assert f"resuming from step 3 of {STEPS}" in said
    assert ("found" in said) == (cfg.reference == "cached") and "computed" not in said
    assert lines_of(cfg) == lines_of(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), jax.device_get(result.state))


@pytest.mark.slow
def test_kto_starts_at_a_half_and_learns(whole):
    cfg, _ = whole("kto")
    evaluated = curve(cfg, "h/loss")
    assert evaluated[0] == 0.5  # no gain, and a baseline of 0
    assert curve(cfg, "train/loss")[0] == pytest.approx(0.5, abs=1e-6)
    assert evaluated[-1] < 0.49
    last = lines_of(cfg)[-1]
    assert last["h/responses"] == 2 and last["h/rewards_chosen"] > last["h/rewards_rejected"]


@pytest.mark.slow
def test_a_loss_without_a_reference_needs_none(whole, capsys):
    cfg, result = whole("simpo")
    assert "reference log-probabilities" not in capsys.readouterr().out
    assert not (Path(cfg.run_dir) / "reference").exists() and result.state.frozen is None
    evaluated = curve(cfg, "h/loss")
    assert evaluated[-1] < 0.8 * evaluated[0]
    assert not any("displacement" in name for line in lines_of(cfg) for name in line)


@pytest.mark.slow
def test_eight_devices_give_the_same_numbers(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(wiring, "make_mesh", make_mesh)
    cfg = config(tmp_path, mesh=MeshConfig(fsdp=2))
    dpo.run(cfg)
    assert lines_of(cfg)[0]["h/loss"] == LOG_2 and lines_of(cfg)[0]["h/margins"] == 0.0
    for a, b in zip(lines_of(cfg), lines_of(whole("cached")[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
