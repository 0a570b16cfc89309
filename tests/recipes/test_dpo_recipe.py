"""The preference recipe as a whole: first evaluations, learning, adapters, resuming, the reference's cache, errors."""

from __future__ import annotations

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.data.config import DataConfig
from jaxlm.data.loader import Loader
from jaxlm.data.sources import SourceConfig
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.lora import LoraConfig
from jaxlm.recipes import dpo
from jaxlm.recipes.config import to_dataclass
from jaxlm.recipes.preference_losses import OVER_BATCH, LossTerm
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.checkpoint import load_record
from jaxlm.train.config import TrainConfig
from jaxlm.train.optim import OptimConfig
from jaxlm.train.preemption import Preempted
from jaxlm.train.reference import fingerprint

MODEL = DecoderConfig(vocab_size=259, width=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=16,
                      mlp_gated=False, rope=None, learned_positions=True, max_length=80, scan_layers=False)  # fmt: skip
LORA = LoraConfig(rank=2)
LOG_2 = float(np.float32(math.log(2)))
STEPS = 6


def rows(n: int, seed: int = 0) -> tuple[dict[str, Any], ...]:
    """Ragged pairs whose chosen replies are of a's and whose rejected ones of b's; and such responses with labels."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        chosen, rejected = "a" * rng.integers(1, 9), "b" * rng.integers(1, 9)
        response = {"completion": (chosen, rejected)[i % 2], "label": i % 2 == 0}
        found.append({"prompt": "p" * rng.integers(1, 5) + str(i), "chosen": chosen, "rejected": rejected, **response})
    return tuple(found)


def config(run_dir: Path, **changes: Any) -> dpo.Config:
    # Two pairs are held out: the sum of their losses is not rounded. Rows are longer than their targets' capacity, 64.
    data = dict(
        train=(SourceConfig("memory", rows=rows(60), name="t"),),
        heldout=(SourceConfig("memory", rows=rows(2, seed=1), name="h"),),
        examples="pairs", packing="pack", sequence_length=80, batch_size=8, epochs=9, num_threads=0,
    ) | changes.pop("data", {})  # fmt: skip
    train = dict(num_steps=STEPS, log_every=1, eval_every=1, checkpoint_every=2) | changes.pop("train", {})
    optim = OptimConfig(learning_rate=1e-2, weight_decay=0.0, schedule="constant")
    base = dict(data=DataConfig(**data), train=TrainConfig(**train), optim=optim, model=MODEL)
    return dpo.Config(run_dir=str(run_dir), **base | changes)


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Programs that several runs compile alike are compiled once."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(dpo, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
    monkeypatch.setattr(dpo, "plot_run", lambda *arguments, **options: "none drawn")  # a second of matplotlib


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


@pytest.mark.parametrize("name", ["cached", "lora_live", *slow("live", "lora_cached")])
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


@pytest.mark.parametrize("name", ["cached", "sync_every", *slow("live", "lora_live", "kto")])
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


class Stopped(Exception):
    """Raised in place of training."""


@pytest.fixture
def reference_of(monkeypatch, capsys):
    """config -> what a run does about its reference (found or computed, for each data set) before it would train."""

    def stop(*arguments, **options):
        raise Stopped

    monkeypatch.setattr(dpo, "train", stop)

    def started(cfg: dpo.Config) -> str:
        capsys.readouterr()
        with pytest.raises(Stopped):
            dpo.run(cfg)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference log-prob")]
        return " ".join(line.split(": ")[1].split(",")[0] for line in said)

    return started


def test_the_cache_is_found_and_a_change_makes_it_anew(tmp_path, reference_of):
    def kept(name: str, **changes: Any) -> dpo.Config:
        return config(tmp_path / name, cache_dir=str(tmp_path / "cache"), **changes)

    assert reference_of(kept("a")) == "computed computed"
    assert reference_of(kept("b")) == "found found"
    # What does not change a number: another run folder, how long it trains, at which rate, which loss.
    changes = dict(train=dict(num_steps=9), optim=OptimConfig(learning_rate=1.0), losses=(LossTerm("ipo"),))
    assert reference_of(kept("c", **changes)) == "found found"
    assert reference_of(kept("d", train=dict(seed=1))) == "computed computed"  # other parameters
    assert reference_of(kept("e", ld_alpha=0.5)) == "computed computed"
    # Other training data; and with it the shape of every batch, so that the held-out numbers may round differently.
    other = SourceConfig("memory", rows=rows(60, 2), name="t")
    assert reference_of(kept("f", data=dict(train=(other,)))) == "computed computed"
    assert reference_of(kept("h", data=dict(sequence_length=72))) == "computed computed"
    assert reference_of(kept("b")) == "found found"
    # One file of numbers for each, and beside it what it depends on.
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2 + 2 + 2 + 2 + 2
    for path in (tmp_path / "cache").glob("*.npy"):
        key, values = json.loads(path.with_suffix(".json").read_text()), np.load(path)
        assert {"parameters", "data", "ld_alpha", "model", "sequence_length"} <= key.keys()
        assert values.dtype == np.float32 and len(values) in (4, 120) and (values < 0).all()


def test_the_cache_of_a_run_is_in_its_folder(tmp_path, reference_of):
    cfg = config(tmp_path)
    assert reference_of(cfg) == "computed computed"
    assert len(list((tmp_path / "reference").glob("*.npy"))) == 2
    assert reference_of(cfg) == "found found"


@pytest.mark.slow
def test_eight_devices_give_the_same_numbers(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "make_mesh", make_mesh)
    cfg = config(tmp_path, mesh=MeshConfig(fsdp=2))
    dpo.run(cfg)
    assert lines_of(cfg)[0]["h/loss"] == LOG_2 and lines_of(cfg)[0]["h/margins"] == 0.0
    for a, b in zip(lines_of(cfg), lines_of(whole("cached")[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((4, 6)).astype(np.float32),
        "b": {"c": rng.standard_normal((2, 3, 4)).astype(np.float32), "d": rng.integers(0, 9, 5).astype(np.int32)},
        "e": np.asarray(jnp.asarray(rng.standard_normal(8), jnp.bfloat16)),
        "f": np.float32(rng.standard_normal()),
    }


def changed(path: tuple[str, ...], change) -> dict[str, Any]:
    """The tree with `change` made to one array, on a copy."""
    out = jax.tree.map(np.array, tree())
    node = out
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = change(node[path[-1]])
    return out


def flip(bit: int, at: int = 0):
    """One bit of one word."""

    def change(x):
        words = x.reshape(-1).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).copy()
        words[at] ^= words.dtype.type(1 << bit)
        return words.view(x.dtype).reshape(x.shape)

    return change


def swap(i: int, j: int):
    def change(x):
        flat = x.reshape(-1).copy()
        flat[[i, j]] = flat[[j, i]]
        return flat.reshape(x.shape)

    return change


CHANGES = {
    "the lowest bit": changed(("a",), flip(0, 7)),
    "the sign": changed(("a",), flip(31, 7)),
    "a bit of another array": changed(("b", "c"), flip(3, 23)),
    "a bit of bfloat16": changed(("e",), flip(0, 2)),
    "a bit of a scalar": changed(("f",), flip(0)),
    "an integer": changed(("b", "d"), lambda x: x + np.eye(1, 5, 3, dtype=np.int32)[0]),
    "two entries swapped": changed(("a",), swap(3, 4)),
    "two entries of two rows swapped": changed(("a",), swap(0, 6)),
    "0 and -0": changed(("a",), lambda x: np.where(np.arange(24).reshape(4, 6) == 5, -0.0, x).astype(np.float32)),
    "0 in its place": changed(("a",), lambda x: np.where(np.arange(24).reshape(4, 6) == 5, 0.0, x).astype(np.float32)),
    "another shape": changed(("a",), lambda x: x.reshape(6, 4)),
    "transposed": changed(("a",), lambda x: x.T.copy()),
    "another dtype": changed(("b", "d"), lambda x: x.view(np.float32)),
    "another name": {**{k: v for k, v in tree().items() if k != "e"}, "g": tree()["e"]},
    "two names swapped": {**tree(), "a": tree()["a"], "b": {"c": tree()["b"]["d"], "d": tree()["b"]["c"]}},
    "an array more": {**tree(), "z": np.zeros(1, np.float32)},
    "an array less": {k: v for k, v in tree().items() if k != "e"},
}


def test_the_fingerprint_sees_every_change():
    prints = {name: fingerprint(params) for name, params in CHANGES.items()}
    prints["as it was"] = fingerprint(tree())
    assert len(set(prints.values())) == len(prints)
    assert fingerprint(jax.tree.map(jnp.asarray, tree())) == prints["as it was"]
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints.values())


def test_the_fingerprint_is_the_same_on_any_mesh():
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((3, 8, 4)).astype(np.float32) for name in "ab"}
    expected = fingerprint(params)
    mesh = make_mesh(MeshConfig(fsdp=4, data=2))
    for axes in ((None, "fsdp", None), (None, "data", "fsdp"), ()):
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec(*axes)))
        assert len(placed["a"].sharding.device_set) == 8
        assert fingerprint(placed) == expected


def terms(*names: str, **options: float) -> dict[str, Any]:
    return dict(losses=tuple(LossTerm(name, options=options or dict(beta=0.1)) for name in names))


REFUSED = {
    "no loss": (dict(losses=()), "expected at least one"),
    "kto on pairs": (terms("kto"), "kto needs data.examples='responses_mismatched', found 'pairs'"),
    "kto without mismatches": (
        terms("kto") | dict(data=dict(examples="responses")),
        "kto needs data.examples='responses_mismatched', found 'responses'",
    ),
    "bco with mismatches": (
        terms("bco") | dict(data=dict(examples="responses_mismatched")),
        "bco needs data.examples='responses', found 'responses_mismatched'",
    ),
    "dpo on responses": (dict(data=dict(examples="responses")), "dpo needs data.examples='pairs', found 'responses'"),
    "dpo on documents": (dict(data=dict(examples="documents")), "dpo needs data.examples='pairs', found 'documents'"),
    "kto beside dpo": (terms("dpo", "kto"), r"kto is of single responses and is never summed.*\['dpo', 'kto'\]"),
    "sync of a cache": (dict(sync_every=2), "sync_every moves the reference: it needs reference='live' and no lora"),
    "sync of adapters": (
        dict(sync_every=2, reference="live", lora=LORA),
        "sync_every moves the reference: it needs reference='live' and no lora",
    ),
    "ld_alpha of responses": (
        terms("kto") | dict(data=dict(examples="responses_mismatched"), ld_alpha=0.5),
        "ld_alpha compares the two responses of a pair, found data.examples='responses_mismatched'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_that_cannot_be_are_refused(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("name", OVER_BATCH)
def test_losses_over_the_batch_refuse_micro_batches(tmp_path, name):
    examples = {"kto": "responses_mismatched", "bco": "responses"}.get(name, "pairs")
    changes = terms(name) | dict(data=dict(examples=examples))
    config(tmp_path, **changes)
    message = f"{name} depends on the whole batch.*set train.num_microbatches=1, found 2"
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes, train=dict(num_microbatches=2))
    if examples == "pairs":  # also as the second of a sum
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **terms("dpo", name), train=dict(num_microbatches=2))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (dict(name="dop"), "'dop' is none of them; did you mean dpo"),
        (dict(name="dpo", options=dict(bta=0.1)), "losses.dpo: expected the options beta, found bta; missing: beta"),
        (dict(name="dpo", options=dict(beta=0.1, label_smoothing=0.1)), "expected the options beta, found beta, label"),
        (dict(name="cdpo"), "expected the options beta, label_smoothing, found beta; missing: label_smoothing"),
        (dict(name="simpo", options=dict(beta=2.0)), "expected the options beta, gamma, found beta; missing: gamma"),
        (dict(name="simpo", options=dict(beta=2.0, gamma=1.0), divergence="forward_kl"), "simpo takes no divergence"),
        (dict(name="kto", divergence="js_divergence"), "losses.kto takes no divergence, found 'js_divergence'"),
        (dict(name="apo_zero", divergence="js_divergence"), "losses.apo_zero takes no divergence"),
    ],
)
def test_terms_that_cannot_be_are_refused(term, message):
    with pytest.raises(ValueError, match=message):
        LossTerm(**term)


def test_a_config_of_plain_values_is_the_same():
    given = dict(name="dpo", options=dict(beta=1), divergence="alpha_divergence", alpha=0.3)
    term = to_dataclass(LossTerm, given)
    assert term == LossTerm("dpo", 1.0, {"beta": 1.0}, "alpha_divergence", 0.3)
    assert type(term.options["beta"]) is float
    with pytest.raises(ValueError, match="expected one of 'reverse_kl', "):
        to_dataclass(LossTerm, given | dict(divergence="kl"))


def test_a_run_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give init_from .* or model"):
        dpo.run(config(tmp_path, model=None))


def test_a_loss_without_options_needs_none():
    assert to_dataclass(LossTerm, dict(name="sft")).options == {}


def test_ld_alpha_outside_its_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ld_alpha"):
        config(tmp_path, ld_alpha=1.5)


def test_a_moving_reference_that_nothing_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sync_every"):
        config(tmp_path, **terms("cpo"), sync_every=2, reference="live")


def test_a_z_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="z_loss"):
        config(tmp_path, train=dict(z_loss=1e-4))
