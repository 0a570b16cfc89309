"""The reference's log-probabilities: when they are found and when computed, and the fingerprint of parameters."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.data.sources import SourceConfig
from jaxlm.recipes import dpo, wiring
from jaxlm.recipes.preference_losses import LossTerm
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.optim import OptimConfig
from jaxlm.train.reference import fingerprint

SETUP = runpy.run_path(str(Path(__file__).with_name("dpo_setup.py")))
rows, config, compile_cache, one_device = (SETUP[name] for name in ("rows", "config", "compile_cache", "one_device"))


class Stopped(Exception):
    """Raised in place of training."""


@pytest.fixture
def reference_of(monkeypatch, capsys):
    """config -> what a run does about its reference (found or computed, for each data set) before it would train."""

    def stop(*arguments, **options):
        raise Stopped

    monkeypatch.setattr(wiring, "train", stop)

    def started(cfg: dpo.Config) -> str:
        capsys.readouterr()
        with pytest.raises(Stopped):
            dpo.run(cfg)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference log-prob")]
        return " ".join(line.split(": ")[1].split(",")[0] for line in said)

    return started


@pytest.mark.slow
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


@pytest.mark.slow
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
