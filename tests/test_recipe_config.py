"""Config files, overrides, and the typed edge: what is refused, and what the message says."""

from __future__ import annotations

import dataclasses
from typing import Literal

import ml_collections
import pytest

from jaxlm.recipes.config import load_config, to_dataclass, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-3
    name: Literal["adamw", "lion"] = "adamw"
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class Small:
    width: int
    heads: int = 1


@dataclasses.dataclass(frozen=True)
class Large:
    width: int
    kv_heads: int
    depth: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    optim: Inner = Inner()
    sources: tuple[Inner, ...] = ()
    shape: tuple[int, int] = (1, 2)
    flag: bool = False
    mapping: dict[str, int] = dataclasses.field(default_factory=dict)
    mixed: int | str = 0
    model: Small | Large | None = None


FILE = """
import ml_collections

def get_config(arg="10"):
    c = ml_collections.ConfigDict(dict(steps=int(arg), optim=dict(learning_rate=0.5)))
    c.sources = [dict(learning_rate=1.0)]
    c.lock()
    return c
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(FILE)
    return str(path)


def test_file_argument_and_overrides(config_file):
    overrides = ["optim.learning_rate=1", "optim.name=lion", "sources.0.clip=2.5", "mixed=word", "mapping.a=3"]
    cfg = to_dataclass(Outer, load_config(config_file + ":7", overrides))
    assert cfg == Outer(
        steps=7, optim=Inner(1.0, "lion"), sources=(Inner(1.0, clip=2.5),), mixed="word", mapping={"a": 3}
    )
    assert isinstance(cfg.optim.learning_rate, float)


def test_round_trip_through_plain_dict(config_file):
    cfg = to_dataclass(Outer, load_config(config_file))
    assert to_dataclass(Outer, to_dict(cfg)) == cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rte=1", r"config\.optim\.learning_rte: Inner has no such field; did you mean learning_rate"),
        ("optim.zzz=1", r"the fields are clip, learning_rate, name"),
        ("steps=1.5", r"config\.steps: expected int, found 1\.5 \(float\)"),
        ("steps=True", r"config\.steps: expected int, found True"),
        ("flag=1", r"config\.flag: expected bool, found 1"),
        ("optim.name=adam", r"config\.optim\.name: expected one of 'adamw', 'lion', found 'adam'"),
        ("optim.clip=abc", r"config\.optim\.clip: expected float, found 'abc'"),
        ("shape=(1,2,3)", r"config\.shape: expected 2 items, found 3"),
        ("sources.3.clip=1", r"sources is a list of 1"),
        ("steps.x=1", r"steps is 10, which has no fields"),
        ("mixed=1.5", r"config\.mixed: expected int or str, found 1\.5"),
        ("optim=3", r"config\.optim: expected a group of fields \(Inner\), found 3"),
        ("steps", r"--config\.steps: expected --config\.steps=VALUE"),
    ],
)
def test_bad_overrides_are_refused_with_the_way_out(config_file, override, message):
    with pytest.raises(ValueError, match=message):
        to_dataclass(Outer, load_config(config_file, [override]))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (dict(width=1), Small(1)),
        (dict(width=1, kv_heads=2), Large(1, 2)),
        (Large(1, 2), Large(1, 2)),
        (None, None),
        (dict(width=1, haeds=2), "model.haeds: Small has no such field; did you mean heads"),
        (dict(width=1, kv_heds=2, depth=3), "model.kv_heds: Large has no such field; did you mean kv_heads"),
        (dict(width=1, kv_heads="2"), r"model.kv_heads: expected int, found '2' \(str\)"),
        (dict(heads=2), "model: Small needs width"),
        (3, "model: expected Small or Large or NoneType, found 3"),
    ],
)
def test_a_group_of_one_of_two_kinds_is_the_kind_that_it_looks_like(model, expected):
    values = dict(steps=1, model=ml_collections.ConfigDict(model) if isinstance(model, dict) else model)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            to_dataclass(Outer, values)
        return
    cfg = to_dataclass(Outer, values)
    assert cfg.model == expected and to_dataclass(Outer, to_dict(cfg)) == cfg


def test_missing_field_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="config: Outer needs steps"):
        to_dataclass(Outer, ml_collections.ConfigDict())
    with pytest.raises(ValueError, match="no such file"):
        load_config(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="defines no get_config"):
        load_config(str(tmp_path / "empty.py"))
