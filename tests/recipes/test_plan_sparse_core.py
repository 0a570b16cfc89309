"""Collectives on SparseCores: who gets the compiler's options, and that over a whole slice FSDP then scatters."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxlm.recipes.plan import could_scatter
from jaxlm.sharding.topology import ENVIRONMENT
from jaxlm.train.loop import compile_ahead
from jaxlm.train.sparse_core import OPTIONS, compiler_options

ROOT = Path(__file__).parents[2]


@pytest.fixture
def level():
    """Sets how much pains the compiler takes; tests take the least."""
    before = jax.config.jax_optimization_level
    yield partial(jax.config.update, "jax_optimization_level")
    jax.config.update("jax_optimization_level", before)


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"])
def test_chips_with_sparse_cores_get_the_options(kind, level):
    level("UNKNOWN")
    assert compiler_options(SimpleNamespace(device_kind=kind)) == OPTIONS


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "NVIDIA H200", "cpu"])
def test_others_get_none_and_it_is_said(kind, caplog):
    with caplog.at_level(logging.INFO, "jaxlm.train.sparse_core"):
        assert compiler_options(SimpleNamespace(device_kind=kind)) == {}
    assert f"no SparseCores on {kind}" in caplog.text


def test_they_are_off_where_libtpu_would_end_the_process(level, caplog):
    level("O0")
    assert compiler_options(SimpleNamespace(device_kind="TPU v5")) == {} and "sparse_core is off" in caplog.text


def test_a_cpu_compiles_the_same_step():
    step = compile_ahead(lambda state, batch: (state + batch, {}), jax.numpy.ones(3), 2.0, sparse_core=True)
    assert step(jax.numpy.ones(3), 2.0)[0].tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("kind", "sparse_core", "sums", "said"),
    [("TPU v5", False, 3.0, True), ("TPU v5", False, 1.0, False), ("TPU v5", True, 3.0, False),
     ("TPU v5 lite", False, 3.0, False)],
)  # fmt: skip
def test_a_plan_says_where_they_would_halve_the_bytes(kind, sparse_core, sums, said):
    fsdp = {("all-reduce", ("fsdp",)): (1, sums), ("all-gather", ("fsdp",)): (1, 2.0)}
    plan = SimpleNamespace(sent=fsdp | {("all-reduce", ("data",)): (1, 9.0)})
    of_stages = SimpleNamespace(sparse_core=sparse_core)
    for cfg in of_stages, SimpleNamespace(train=of_stages):
        assert could_scatter(cfg, plan, SimpleNamespace(device_kind=kind)) == said


FSDP = """if True:
    import dataclasses, json, sys
    from jaxlm.models import decoder
    from jaxlm.models import spec as specs
    from jaxlm.recipes import plan
    from jaxlm.recipes.shrink import shrink
    from jaxlm.recipes.train import load_recipe
    from jaxlm.sharding.mesh import MeshConfig
    from jaxlm.sharding.topology import devices_of

    config, topology = sys.argv[1:]
    recipe, cfg = load_recipe(config, ["data.tokenizer=bytes"])
    devices = devices_of(topology)
    cfg = dataclasses.replace(shrink(recipe.resolve(cfg)), mesh=MeshConfig(fsdp=len(devices)))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=2 * len(devices), sequence_length=512))
    train = dataclasses.replace(cfg.train, num_microbatches=2)
    shape = dict(num_layers=4, width=1024, mlp_width=2048, head_dim=128, max_length=512, vocab_size=16384)
    cfg = dataclasses.replace(cfg, train=train, model=dataclasses.replace(cfg.model, **shape))
    made = plan.make_plan(cfg, devices)
    sent = {kind: sent for (kind, axes), (_, sent) in made.sent.items() if axes == ("fsdp",)}
    layers = specs.count(decoder.spec(cfg.model)["layers"])
    print(json.dumps(sent | {"layers": layers, "table": cfg.model.vocab_size * cfg.model.width}))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")
@pytest.mark.parametrize(("topology", "devices"), [("v5p:4x4x4", 64)])
def test_over_a_whole_slice_fsdp_gathers_once_a_pass_and_scatters_gradients(topology, devices):
    command = [sys.executable, "-c", FSDP, str(ROOT / "configs/pretrain/llama_8b_pod.py"), topology]
    env = {name: value for name, value in os.environ.items() if name != "JAX_OPTIMIZATION_LEVEL"}
    done = subprocess.run(command, env=env | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sent = json.loads(done.stdout)
    once = 2 * (devices - 1) / devices  # two micro-batches, of what a device sends of an array
    weights = sent["layers"] + sent["table"]
    # bfloat16, forward and backward; the weights of attention once more where the backward pass makes states again.
    assert 2 * 2 * once * weights <= sent["all-gather"] < 3 * 2 * once * weights
    # Of the layers as products give them, bfloat16 here or float32; of the table float32.
    assert once * (2 * sent["layers"] + 4 * sent["table"]) <= sent["reduce-scatter"] <= 1.01 * once * 4 * weights
    assert sent["all-reduce"] < 0.01 * sent["reduce-scatter"]  # numbers, and the gains of norms
