"""jaxlm plan: what the compiled step says of memory and network, on simulated devices and for a TPU slice."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.lora import LoraConfig
from jaxlm.recipes import plan as planning
from jaxlm.recipes.shrink import shrink
from jaxlm.recipes.train import load_recipe
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.sharding.topology import ENVIRONMENT
from jaxlm.train.chips import CHIPS, Chip
from jaxlm.train.memory import total_bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cfg():
    recipe, found = load_recipe(str(ROOT / "configs/pretrain/llama_8b_pod.py"), ["data.tokenizer=bytes"])
    small = shrink(recipe.resolve(found))
    data = dataclasses.replace(small.data, batch_size=64)
    return dataclasses.replace(small, mesh=MeshConfig(fsdp=8), data=data)


@pytest.fixture(autouse=True)
def a_chip(monkeypatch):
    monkeypatch.setattr(planning, "peaks", lambda mesh: Chip(1e12, 2.0**30, 1e11, 1e10, 1e9))


def test_a_plan_counts_shards_and_collectives(cfg):
    plan = planning.make_plan(cfg, jax.devices())
    number = specs.count(decoder.spec(cfg.model))
    assert number * 4 / 8 <= plan.memory["parameters"] < number * 4 / 7  # but for norms, which are whole everywhere
    assert plan.memory["optimizer"] == pytest.approx(2 * plan.memory["parameters"], rel=0.01)
    assert plan.memory["temporaries"] > 0 and plan.total < plan.capacity
    kinds = {kind for kind, axes in plan.sent if axes == ("fsdp",)}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    runs, sent = plan.sent["all-gather", ("fsdp",)]
    gathered = cfg.train.num_microbatches * plan.memory["parameters"]
    assert runs >= cfg.model.num_layers and sent > gathered / 2  # bfloat16, at least once a micro-batch
    assert 0 < plan.mfu_bound <= 1 and plan.times["products"] == plan.model_flops / 8 / 1e12
    text = planning.render(plan)
    assert "of 1.0 GiB: fits" in text and "all-gather" in text and "MFU at most" in text
    assert json.loads(json.dumps(planning.as_dict(plan)))["total"] == plan.total


def test_fsdp_gathers_each_parameter_once_a_pass_and_no_table_for_its_gradient(cfg):
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=2**15))  # no table is a small part
    plan = planning.make_plan(cfg, jax.devices())
    table = cfg.model.vocab_size * cfg.model.width
    kernels = specs.count(decoder.spec(cfg.model)["layers"])
    # float32, of which a device sends 7 of 8 parts; two micro-batches; forward, and again for the backward pass
    once = cfg.train.num_microbatches * 4 * 7 / 8
    assert plan.sent["all-gather", ("fsdp",)][1] == pytest.approx(2 * once * (table + kernels), rel=0.01)
    assert plan.sent["reduce-scatter", ("fsdp",)][1] == pytest.approx(once * table, rel=0.01)
    tokens = cfg.data.batch_size * cfg.data.sequence_length / 8 / cfg.train.num_microbatches
    exchanged = plan.sent["all-to-all", ("fsdp",)][1]  # of the embedding: its rows there, and their gradients back
    assert exchanged == pytest.approx(2 * once * tokens * cfg.model.width, rel=0.01)


@dataclasses.dataclass
class Device:
    """One that is not here: the n-th GPU of a cluster of nodes of four, or a chip of slices of four."""

    id: int
    platform: str = "gpu"

    @property
    def process_index(self):
        return self.id // 4

    @property
    def slice_index(self):
        return self.id // 4


# Axes of 2 x 2 x 4 devices in nodes of four: b and c lie as the nodes do, a b joins four of them, c d within one.
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    "axes, shares", [("b", (1, 0)), ("c", (1, 0)), ("bc", (1, 0)), ("a", (0, 1)), ("ab", (1, 3 / 7)), ("", (1, 0))]
)
def test_a_collective_over_several_nodes_shares_their_network(platform, axes, shares):
    devices = np.array([Device(i, platform) for i in range(16)], dtype=object).reshape(4, 2, 2)
    mesh = SimpleNamespace(devices=devices, axis_names=("a", "b", "c"))
    assert planning.wire_shares(mesh, tuple(axes)) == shares


LEVELS = ("JAX_OPTIMIZATION_LEVEL", "JAX_MEMORY_FITTING_LEVEL")
"""How little pains the compiler takes in tests."""
GOLDEN = sorted((ROOT / "tests/golden/plans").glob("*.json"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_a_shipped_config_pays_what_it_paid_when_its_golden_numbers_were_taken(golden, tmp_path):
    """Anew: jaxlm plan --config configs/F.py --topology T … --no-batch --json tests/golden/plans/NAME.json, for chips
    without SparseCores with --quick."""
    expected = json.loads(golden.read_text())
    command = [sys.executable, "-m", "jaxlm.cli", "plan", *expected["arguments"], "--no-batch"]
    command += ["--json", str(tmp_path / "plan.json")]
    env = {name: value for name, value in os.environ.items() if name not in LEVELS}
    done = subprocess.run(command, cwd=ROOT, env=env | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "plan.json").read_text())
    for name in ("prefill", "decode") if "decode" in expected else (None,):
        check_plan(*((plan if name is None else plan[name]) for plan in (found, expected)))


def check_plan(found, expected):
    # Patches of the compiler move a little; what the contract forbids, a table gathered or summed whole, is no little.
    assert found["total"] == pytest.approx(expected["total"], rel=0.03)
    by_axes = [
        {(x["kind"], *x["axes"]): x["bytes"] for x in plan["sent"] if x["bytes"] > 0.001 * plan["sent"][0]["bytes"]}
        for plan in (found, expected)
    ]
    assert by_axes[0] == pytest.approx(by_axes[1], rel=0.03)


TENSOR_PARALLEL = """if True:
    import dataclasses, json, sys
    from jaxlm.recipes import plan
    from jaxlm.recipes.shrink import shrink
    from jaxlm.recipes.train import load_recipe
    from jaxlm.sharding.mesh import MeshConfig
    from jaxlm.sharding.topology import devices_of

    recipe, cfg = load_recipe(sys.argv[1], ["data.tokenizer=bytes"])
    cfg = dataclasses.replace(shrink(recipe.resolve(cfg)), mesh=MeshConfig(data=4, tensor=2))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=64, sequence_length=512))
    shape = dict(num_layers=4, width=512, mlp_width=1024, head_dim=128, max_length=512, vocab_size=8192)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **shape))
    made = plan.make_plan(cfg, devices_of("v5e:2x4"))
    print(json.dumps(made.sent["all-reduce", ("tensor",)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")
def test_tensor_parallel_pays_two_sums_a_layer_and_pass():
    command = [sys.executable, "-c", TENSOR_PARALLEL, str(ROOT / "configs/pretrain/llama_8b_pod.py")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    _, sent = json.loads(done.stdout)
    # A layer: two forward, two backward, and of the forward pass made again the first. The embedding's lookup, and the
    # gradient of what meets the head. Two micro-batches, of float32, since products accumulate in it; a sum of two
    # devices sends an array once. What is left are numbers of tokens.
    stream = 64 // 2 // 4 * 512 * 512 * 4
    assert sent == pytest.approx(2 * (4 * 5 + 2) * stream, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jaxlm[cuda]")
def test_the_command_plans_for_gpus_that_are_not_here():
    command = [sys.executable, "-m", "jaxlm.cli", "plan", "--config", str(ROOT / "configs/quickstart.py"), "--no-batch"]
    command += ["--topology", "h100:2x4", "--config.mesh.fsdp=4", "--config.mesh.data=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 devices, NVIDIA H100" in done.stdout and "of 80.0 GiB: fits" in done.stdout
    assert re.search(r"between +[\d.]+ ms", done.stdout) and re.search(r"reduce.* fsdp ", done.stdout)


MEASURED = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.recipe = "lm"
    config.run_dir = "{run_dir}"
    config.model = dict(vocab_size={vocab}, width={width}, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64,
                        mlp_width=4 * {width}, max_length=512)
    config.data = dict(tokenizer="bytes", sequence_length=128, batch_size=4,
                       train=[dict(kind="text", path="{text}")])
    config.optim = dict(learning_rate=3e-3)
    config.train = dict(num_steps=4, log_every=1, checkpoint_every=None, eval_every=None)
    config.mesh = dict(fsdp=4)
    return config
"""


def peak_of_a_run(config: Path, run_dir: Path) -> int:
    """Resident bytes of `jaxlm train` on four simulated devices, at most, until three steps are done."""
    command = [sys.executable, "-m", "jaxlm.cli", "train", "--config", str(config), "--simulate-devices", "4"]
    env = os.environ | {"XLA_FLAGS": ""}  # steps of which tests make few are slow where they are compiled for tests
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env), 0
    lines = run_dir / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") >= 3):
        statm = Path(f"/proc/{process.pid}/statm").read_text().split()
        peak = max(peak, int(statm[1]) * os.sysconf("SC_PAGE_SIZE") if statm else 0)
        time.sleep(0.01)
    process.kill()
    process.wait()
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_run_takes_the_memory_that_its_plan_says(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(20_000)))
    found = []
    for name, width, vocab in (("large", 768, 16384), ("small", 64, 259)):
        config = tmp_path / f"{name}.py"
        made = dict(run_dir=tmp_path / name, text=tmp_path / "text.txt", width=width, vocab=vocab)
        config.write_text(MEASURED.format(**made))
        recipe, cfg = load_recipe(str(config), [])
        plan = planning.make_plan(recipe.resolve(cfg), jax.devices()[:4])
        found.append((4 * plan.total, peak_of_a_run(config, tmp_path / name)))
    planned, used = (large - small for large, small in zip(*found, strict=True))
    assert planned > 1e9 and used == pytest.approx(planned, rel=0.1)


STAGES = [("blocksworld", name) for name in ("cot", "contextual", "latent", "coconut-2")]


@pytest.mark.parametrize(
    "name, stage", [("unsup", None), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("hh_small", None), *STAGES))]
)
def test_every_recipe_that_trains_has_a_plan(name, stage):
    (path,) = (ROOT / "configs").rglob(f"{name}.py")
    recipe, cfg = load_recipe(str(path), ["mesh.fsdp=8", "data.batch_size=16"])
    plan = planning.make_plan(recipe.resolve(cfg), jax.devices(), stage)
    assert 0 < plan.mfu_bound <= 1 and plan.memory["parameters"] > 0 and plan.assumed
    assert bool(plan.memory["frozen"]) == (stage == "latent")  # its sentence decoder
    assert ("all-to-all", ("fsdp",)) in plan.sent  # of the embedding


@pytest.mark.slow
def test_a_live_reference_and_adapters_are_frozen_parameters_of_the_plan():
    def plan(*overrides):
        recipe, cfg = load_recipe(str(ROOT / "configs/dpo/hh_small.py"), ["mesh.fsdp=8", "data.batch_size=16"])
        return planning.make_plan(dataclasses.replace(recipe.resolve(cfg), **dict(overrides)), jax.devices())

    cached, live, lora = plan(), plan(("reference", "live")), plan(("lora", LoraConfig(rank=8)))
    assert cached.memory["frozen"] == 0 < live.memory["frozen"] == cached.memory["parameters"]
    assert lora.memory["frozen"] == cached.memory["parameters"] > 2 * lora.memory["parameters"]
    assert live.model_flops == pytest.approx(cached.model_flops * 4 / 3)
    assert lora.model_flops == pytest.approx(cached.model_flops * 2 / 3)


def test_a_recipe_without_a_step_and_a_stage_that_is_none_are_refused(cfg):
    with pytest.raises(ValueError, match="knows the recipes lm, dpo, simcse, sentence_by_sentence; found 'sts'"):
        recipe, found = load_recipe(str(ROOT / "configs/eval/sts.py"), ["model=none"])
        planning.make_plan(found, jax.devices())
    with pytest.raises(ValueError, match="--stage is of the recipe sentence_by_sentence, found 'lm'"):
        planning.make_plan(cfg, jax.devices(), "latent")
    recipe, found = load_recipe(str(ROOT / "configs/sentence_by_sentence/blocksworld.py"), ["mesh.fsdp=8"])
    with pytest.raises(ValueError, match="--stage laten: expected one of direct, cot, semantic"):
        planning.make_plan(recipe.resolve(found), jax.devices(), "laten")


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_the_largest_batch_is_between(cfg, monkeypatch):
    plan = planning.make_plan(cfg, jax.devices())
    assert "DOES NOT FIT" in planning.render(plan._replace(capacity=plan.total / 2))
    grown = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=512))
    enough = plan._replace(capacity=planning.make_plan(grown, jax.devices()).total)
    most = planning.largest_batch(cfg, jax.devices(), enough)
    assert most % 8 == 0 and 256 <= most <= 512  # one that was compiled, and fits
    assert planning.largest_batch(cfg, jax.devices(), plan._replace(capacity=1.0)) is None


@pytest.mark.slow
def test_a_plot_is_made(cfg, tmp_path):
    planning.plot(planning.make_plan(cfg, jax.devices()), tmp_path / "plan.png", title="small")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_mesh_of_another_size_and_unknown_chips_are_refused(cfg, monkeypatch):
    with pytest.raises(ValueError, match="needs 16 devices, and there are 8"):
        planning.make_plan(dataclasses.replace(cfg, mesh=MeshConfig(data=1, fsdp=16)), jax.devices())
    monkeypatch.undo()
    plan = planning.make_plan(cfg, jax.devices())  # simulated devices share this machine's memory, and have no peaks
    assert plan.times == {} and plan.mfu_bound is None and "no peaks are known" in planning.render(plan)
    assert plan.capacity == total_bytes() / 8
    with pytest.raises(ValueError, match="no peaks are known of 'abacus'"):
        planning.peaks(SimpleNamespace(devices=np.array([SimpleNamespace(platform="x", device_kind="abacus")])))
    assert all(chip.flops > 1e14 and chip.memory > 1e10 for chip in CHIPS.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")
def test_the_command_plans_for_a_slice_that_is_not_here(tmp_path):
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "jaxlm.cli", "plan", "--config", str(ROOT / "configs/quickstart.py")]
    command += ["--topology", "v5e:2x2", "--json", str(out), "--quick"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 devices, TPU v5 lite" in done.stdout and "of 16.0 GiB: fits" in done.stdout
    plan = json.loads(out.read_text())
    assert plan["largest_batch"] > 8 and "--quick" in plan["arguments"]
    much = [*command, "--config.data.batch_size=65536"]
    done = subprocess.run(much, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "DOES NOT FIT" in done.stderr and "Take more devices" in done.stderr
    command[command.index("v5e:2x2")] = "v5e:nonsense"
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "expected one such as v5e:2x2" in done.stderr
