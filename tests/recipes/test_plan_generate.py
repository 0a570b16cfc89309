"""jaxlm plan --generate: what prefill and decoding take, against what generation really holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.generate import engine
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.recipes.plan_generate import Load, make_plans
from jaxlm.recipes.shrink import shrink
from jaxlm.recipes.train import load_recipe
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import make_constrain
from jaxlm.sharding.rules import param_shardings
from jaxlm.train.flops import matmul_parameters

ROOT = Path(__file__).parents[2]
LOAD = Load(rows=8, prompt=20, new=12)


@pytest.fixture(scope="module")
def cfg():
    recipe, found = load_recipe(str(ROOT / "configs/pretrain/llama_8b_pod.py"), ["data.tokenizer=bytes"])
    return dataclasses.replace(shrink(recipe.resolve(found)), mesh=MeshConfig(fsdp=4, tensor=2))


def bytes_here(x):
    return x.addressable_shards[0].data.nbytes


def test_parameters_and_cache_are_those_that_generation_holds(cfg, monkeypatch):
    plans = make_plans(cfg, jax.devices(), LOAD)
    mesh = make_mesh(cfg.mesh, jax.devices())
    spec = decoder.spec(cfg.model)
    params = jax.device_put(specs.init(jax.random.key(0), spec), param_shardings(spec, mesh))
    seen = []
    decode = engine.decode

    def watched(params, slots, **options):
        seen.append(sum(map(bytes_here, (slots.cache.keys, slots.cache.values))))
        return decode(params, slots, **options)

    monkeypatch.setattr(engine, "decode", watched)
    generate(
        params, ["a" * (LOAD.prompt - 1)] * LOAD.rows, cfg=cfg.model, sampling=SamplingConfig(max_new_tokens=LOAD.new),
        tokenizer=ByteTokenizer(), constrain=make_constrain(mesh), batch_size=LOAD.rows,
    )  # fmt: skip
    for plan in plans.values():
        assert plan.memory["parameters"] == sum(map(bytes_here, jax.tree.leaves(params)))
        assert {plan.memory["cache"]} == set(seen)
        assert plan.memory["temporaries"] > 0
    assert (plans["prefill"].tokens, plans["decode"].tokens) == (8 * 32, 8)
    m = cfg.model
    attention = 4 * m.num_layers * m.num_heads * m.head_dim * 32
    assert plans["decode"].model_flops == 8 * (2 * matmul_parameters(spec) + attention)


def test_a_mesh_writes_what_one_device_writes(cfg):
    mesh = make_mesh(cfg.mesh, jax.devices())
    spec = decoder.spec(cfg.model)
    params = specs.init(jax.random.key(0), spec)
    placed = jax.device_put(params, param_shardings(spec, mesh))
    common = dict(cfg=cfg.model, sampling=SamplingConfig(max_new_tokens=12), tokenizer=ByteTokenizer(), batch_size=2)
    prompts = ["ab", "c" * 20, "hello"]  # fewer rows than devices, and refilled
    one = generate(params, prompts, **common)
    several = generate(placed, prompts, **common, constrain=make_constrain(mesh))
    for a, b in zip(one, several):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_the_command_says_both_and_writes_them(tmp_path, capsys):
    out = tmp_path / "plan.json"
    given = ["--config", str(ROOT / "configs/quickstart.py"), "--topology", "cpu:8"]
    command = ["plan", *given, "--json", str(out), "--config.mesh.data=8"]
    assert main([*command, "--plot", str(tmp_path / "p.png"), "--generate", "8", "30", "30"]) == 0
    found = json.loads(out.read_text())
    assert list(found) == ["prefill", "decode", "arguments"]
    assert found["decode"]["memory"]["cache"] == 2 * 4 * 64 * 2 * 32 * 4
    assert found["arguments"] == [*given, "--generate", "8", "30", "30", "--config.mesh.data=8"]
    told = capsys.readouterr().out
    assert "prefill: compiled in" in told and "decode: compiled in" in told
    assert main([*command, "--generate", "4", "1000", "30"]) != 0
    assert "at most 1024 positions" in capsys.readouterr().err
    assert main([*command, "--generate", "4", "30", "30", "--search", "1"]) != 0
    assert "leave out --search" in capsys.readouterr().err


def test_an_encoder_does_not_generate(cfg):
    with pytest.raises(ValueError, match="the config of a decoder"):
        make_plans(dataclasses.replace(cfg, model=None), jax.devices(), LOAD)
