"""Adapter folders: every family there and back bit for bit, fused tensors, and everything that is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.models import decoder, hf_lora
from jaxlm.models.lora import LoraConfig, lora_spec
from jaxlm.models.spec import flatten, map_spec

LORA = LoraConfig(rank=3, alpha=5.0)


def make_adapters(cfg, lora=LORA, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return map_spec(lambda p: jnp.asarray(rng.standard_normal(p.shape), dtype), lora_spec(decoder.spec(cfg), lora))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


@pytest.mark.parametrize("lora", [LORA, dataclasses.replace(LORA, targets=("v", "q", "down"), rslora=True)])
def test_there_and_back(lora, family, tmp_path):
    adapters = make_adapters(family, lora)
    hf_lora.save(tmp_path / "adapter", adapters, lora, family)
    found, again = hf_lora.load(tmp_path / "adapter", family)
    assert_same(again, adapters)
    assert (found.rank, found.alpha, found.rslora) == (lora.rank, lora.alpha, lora.rslora)
    assert lora_spec(decoder.spec(family), found).keys() == lora_spec(decoder.spec(family), lora).keys()
    assert not list(tmp_path.glob("*.part"))


def test_names_and_config(families, tmp_path):
    lora = dataclasses.replace(LORA, targets=("q", "out"))
    hf_lora.save(tmp_path / "a", make_adapters(families["qwen3"], lora), lora, families["qwen3"], base_model="base")
    shapes = {name: x.shape for name, x in load_file(tmp_path / "a" / hf_lora.TENSORS).items()}
    attention = "base_model.model.model.layers.2.self_attn."
    assert len(shapes) == 12
    pairs = {module: [shapes[f"{attention}{module}.lora_{c}.weight"] for c in "AB"] for module in ("q_proj", "o_proj")}
    assert pairs == {"q_proj": [(3, 16), (32, 3)], "o_proj": [(3, 32), (16, 3)]}
    config = json.loads((tmp_path / "a" / hf_lora.CONFIG).read_text())
    assert config["target_modules"] == ["self_attn.q_proj", "self_attn.o_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5, "base")
    assert not config["rank_pattern"] and not config["fan_in_fan_out"]


def test_fused_kernels_keep_their_products_and_scale(families, tmp_path):
    cfg, lora = families["gpt2"], dataclasses.replace(LORA, targets=("q", "v"))
    adapters = make_adapters(cfg, lora)
    hf_lora.save(tmp_path / "a", adapters, lora, cfg)
    config = json.loads((tmp_path / "a" / hf_lora.CONFIG).read_text())
    assert config["rank_pattern"] == {"attn.c_attn": 9} and config["alpha_pattern"] == {"attn.c_attn": 15}
    assert config["fan_in_fan_out"] and config["target_modules"] == ["attn.c_attn"]
    tensors = load_file(tmp_path / "a" / hf_lora.TENSORS)
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    fused = (tensors[name.format("B")] @ tensors[name.format("A")]).T
    pairs = {path: np.asarray(x[1]) for path, x in flatten(adapters).items()}
    for group, part in zip("qkv", np.split(fused, 3, axis=1)):
        a, b = (pairs.get(f"layers/attn/{group}/lora_{c}", np.zeros((3, 3))) for c in "ab")
        want = a @ b.reshape(3, -1) if group != "k" else np.zeros((16, 16))
        np.testing.assert_allclose(part, want, atol=1e-6)


def test_kernels_that_share_one_a_are_stored_at_their_own_rank(families, tmp_path):
    cfg = families["phi3"]
    adapters = make_adapters(cfg)
    for part in "kv":
        adapters["layers"]["attn"][part]["lora_a"] = adapters["layers"]["attn"]["q"]["lora_a"]
    hf_lora.save(tmp_path / "a", adapters, LORA, cfg)
    assert json.loads((tmp_path / "a" / hf_lora.CONFIG).read_text())["rank_pattern"] == {"mlp.gate_up_proj": 6}
    assert_same(hf_lora.load(tmp_path / "a", cfg)[1], adapters)


def test_bfloat16_files(families, tmp_path):
    adapters = make_adapters(families["gpt2"], dtype=jnp.bfloat16)
    hf_lora.save(tmp_path / "a", adapters, LORA, families["gpt2"])
    assert_same(hf_lora.load(tmp_path / "a", families["gpt2"], dtype=None)[1], adapters)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), adapters)
    assert_same(hf_lora.load(tmp_path / "a", families["gpt2"])[1], wide)


def test_what_cannot_be_saved_says_so(families, tmp_path):
    adapters = make_adapters(families["gpt2"])
    with pytest.raises(ValueError, match="the family 'llama' has no tensors for .*positions/table"):
        hf_lora.save(tmp_path / "a", adapters, LORA, families["gpt2"], family="llama")
    with pytest.raises(ValueError, match="adapters do not fit the model's spec"):
        hf_lora.save(tmp_path / "a", adapters, dataclasses.replace(LORA, rank=2), families["gpt2"])
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="exists: choose a new folder"):
        hf_lora.save(tmp_path / "a", adapters, LORA, families["gpt2"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


LAYER = "base_model.model.transformer.h.0."


def without(name):
    return lambda tensors: tensors.pop(name)


def with_value(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (dict(use_dora=True), None, "expected a plain LoRA adapter, found use_dora=True"),
        (dict(init_lora_weights="pissa"), None, "found init_lora_weights='pissa'"),
        (dict(peft_type="IA3", modules_to_save=["lm_head"]), None, "modules_to_save=.*, peft_type='IA3'"),
        (dict(alpha_pattern={}), None, "attn.c_attn has the scale 0.55.*, and alpha and rank .* give 1.66"),
        ({}, without(LAYER + "mlp.c_fc.lora_A.weight"), "missing tensor .*h.0.mlp.c_fc.lora_A.weight"),
        ({}, with_value("base_model.model.lm_head.lora_A.weight", np.zeros(1)), "unexpected tensor .*lm_head"),
        ({}, with_value(LAYER + "mlp.c_fc.lora_B.weight", np.zeros((9, 3))), r"expected shape \(24, 3\), found \(9, 3"),
        ({}, with_value(LAYER + "attn.c_attn.lora_B.weight", np.ones((48, 9), np.float32)), "rank 9: expected 3, or 9"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_says_so(config, tensors, message, families, tmp_path):
    hf_lora.save(tmp_path / "a", make_adapters(families["gpt2"]), LORA, families["gpt2"])
    path, file = tmp_path / "a" / hf_lora.CONFIG, tmp_path / "a" / hf_lora.TENSORS
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        arrays = load_file(file)
        tensors(arrays)
        save_file(arrays, file)
    with pytest.raises(ValueError, match=message):
        hf_lora.load(tmp_path / "a", families["gpt2"])


def test_the_wrong_folder_or_family_says_so(families, tmp_path):
    with pytest.raises(ValueError, match=r"no adapter_config.json; expected the folder of a peft adapter"):
        hf_lora.load(tmp_path, families["gpt2"])
    hf_lora.save(tmp_path / "a", make_adapters(families["gpt2"]), LORA, families["gpt2"])
    with pytest.raises(ValueError, match="linear modules in all 3 layers of a 'llama' model .another one"):
        hf_lora.load(tmp_path / "a", families["llama2"])
