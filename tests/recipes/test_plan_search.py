"""jaxlm plan --search: what is allowed, what is best on paper, and what the compiler says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from jaxlm.recipes import plan as planning
from jaxlm.recipes import plan_search as searching
from jaxlm.recipes.plan_search import Layout
from jaxlm.recipes.shrink import shrink
from jaxlm.recipes.train import load_recipe
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.train.chips import Chip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cfg():
    recipe, found = load_recipe(str(ROOT / "configs/pretrain/llama_8b_pod.py"), ["data.tokenizer=bytes"])
    small = shrink(recipe.resolve(found))
    data = dataclasses.replace(small.data, batch_size=32)
    return dataclasses.replace(small, mesh=MeshConfig(fsdp=8), data=data)


def with_chip(monkeypatch, **changes):
    chip = Chip(1e12, 2.0**30, 1e11, 1e10, 1e9)._replace(**changes)
    for module in (planning, searching):
        monkeypatch.setattr(module, "peaks", lambda mesh: chip)


def best(cfg):
    return min(searching.guess_all(cfg, jax.devices()), key=searching.rank)


def test_every_layout_divides_the_devices_and_the_rows(cfg):
    found = list(searching.layouts(cfg, 8))
    assert len(found) == len(set(found)) > 100
    for layout in found:
        mesh = layout.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence == 8
        assert cfg.data.batch_size % (mesh.data * mesh.fsdp * layout.num_microbatches) == 0
    assert searching.written_layout(dataclasses.replace(cfg, mesh=MeshConfig(fsdp=2)), 8).mesh.data == 4


def test_a_layout_that_splits_heads_unevenly_is_left_out(cfg, monkeypatch):
    with_chip(monkeypatch)
    kept = {g.layout.mesh.tensor for g in searching.guess_all(cfg, jax.devices())}
    allowed = {n for n in (1, 2, 4, 8) if cfg.model.num_kv_heads % n == 0}
    assert kept == allowed < {1, 2, 4, 8}


def test_on_paper_memory_and_the_network_pull_as_they_should(cfg, monkeypatch):
    with_chip(monkeypatch, network_bandwidth=1e30)  # nothing but products: none are computed again
    assert best(cfg).layout.remat != "full"
    with_chip(monkeypatch, network_bandwidth=1e3)  # what sends least, which gathers no parameters
    least = min(g.times["network"] for g in searching.guess_all(cfg, jax.devices()))
    assert best(cfg).times["network"] == least and best(cfg).layout.mesh.fsdp == 1
    smallest = min(g.memory for g in searching.guess_all(cfg, jax.devices()))
    with_chip(monkeypatch, memory=smallest / searching.MARGIN + 1)  # only what takes least
    assert best(cfg).layout.remat == "full" and best(cfg).layout.mesh.data == 1


def test_the_paper_agrees_with_the_compiler_on_the_state(cfg, monkeypatch):
    with_chip(monkeypatch)
    plan = planning.make_plan(cfg, jax.devices())
    (guess,) = [g for g in searching.guess_all(cfg, jax.devices()) if g.layout == searching.written_layout(cfg, 8)]
    assert plan.memory["parameters"] + plan.memory["optimizer"] < guess.memory
    assert guess.times["products"] == pytest.approx(plan.times["products"] * 4 / 3)  # remat full


@pytest.mark.slow
def test_what_the_search_finds_is_at_least_as_good_as_what_was_written(cfg, monkeypatch):
    with_chip(monkeypatch)
    found = list(searching.search(cfg, jax.devices(), compiles=2))
    assert found[0].layout == searching.written_layout(cfg, 8) and len(found) == 3
    least = min(found, key=lambda x: x.step_s)
    assert least.step_s < found[0].step_s  # which computes everything again
    text = searching.render(found)
    assert text.splitlines()[1].split()[-1] != "written" and "as written" in text
    made = {}
    exec(text.split("config:")[1].replace("    config", "config"), {"dict": dict}, {"config": Config(made)})
    assert made == {
        "mesh": {k: v for k, v in dataclasses.asdict(least.layout.mesh).items() if v != 1},
        "remat": least.layout.remat, "num_microbatches": least.layout.num_microbatches,
    }  # fmt: skip


class Config:
    """Takes what the pasted lines set."""

    def __init__(self, made):
        object.__setattr__(self, "made", made)

    def __setattr__(self, name, value):
        self.made[name] = value

    __setitem__ = __setattr__
    model = train = property(lambda self: self)


def test_what_does_not_fit_says_so_and_comes_last(cfg):
    layout = Layout(MeshConfig(data=1, fsdp=8), "full", 1)
    none = searching.Found(layout, None, float("inf"))
    assert "does not fit" in searching.render([none])


def test_other_recipes_and_devices_without_peaks_are_refused(cfg):
    with pytest.raises(ValueError, match="--search needs the peaks of the devices"):
        next(searching.search(cfg, jax.devices(), compiles=1))
    found = load_recipe(str(ROOT / "configs/simcse/unsup.py"), [])[1]
    with pytest.raises(ValueError, match="--search knows the recipes lm, dpo, found 'simcse'"):
        next(searching.search(found, jax.devices(), compiles=1))
