"""Adapters against peft: its logits from our files, ours from its files, the merged model, files bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file  # noqa: E402

from jaxlm.models import decoder, hf, hf_lora  # noqa: E402
from jaxlm.models import spec as specs  # noqa: E402
from jaxlm.models.lora import LoraConfig, join, lora_spec, merge  # noqa: E402
from jaxlm.models.spec import map_spec, normal  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # theirs; ours are errors in every other file
]

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=64)  # fmt: skip
FAMILIES = {
    "llama": ("Llama", SMALL | dict(attention_bias=True, tie_word_embeddings=False)),
    "mistral": ("Mistral", SMALL | dict(sliding_window=7)),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL | dict(head_dim=16)),
    "gemma2": ("Gemma2", SMALL | dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=24)),
    "gemma3_text": ("Gemma3", SMALL | dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=24)),
    "olmo2": ("Olmo2", SMALL),
    "gpt2": ("GPT2", dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "phi3": ("Phi3", SMALL | dict(pad_token_id=0)),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 20))


def make(family):
    prefix, settings = FAMILIES[family]
    name = prefix + ("TextConfig" if prefix == "Gemma3" else "Config")
    config = getattr(transformers, name)(**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, prefix + ("LMHeadModel" if prefix == "GPT2" else "ForCausalLM"))(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@jax.jit(static_argnames="cfg")
def ours(params, *, cfg):
    hidden = decoder.forward(params, jnp.asarray(TOKENS), cfg=cfg).hidden
    head = decoder.head(params, cfg=cfg)
    logits = hidden @ head["unembed"].T
    return logits if head["soft_cap"] is None else head["soft_cap"] * jnp.tanh(logits / head["soft_cap"])


def assert_close(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_our_adapters_and_we_compute_its_own(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "base")
    cfg, params = hf.load(tmp_path / "base")
    plain = theirs(model)
    _check_ours_in_peft(model, cfg, params, plain, family, tmp_path)
    _check_peft_in_ours(family, cfg, params, plain, tmp_path)


def _check_ours_in_peft(model, cfg, params, plain, family, tmp_path):
    lora = LoraConfig(rank=3, alpha=5.0, targets=("q", "v", "out", "up", "down"))
    tree = map_spec(lambda p: dataclasses.replace(p, init=normal(0.2)), lora_spec(decoder.spec(cfg), lora))
    adapters = specs.init(jax.random.key(1), tree)
    hf_lora.save(tmp_path / "ours", adapters, lora, cfg, family=family)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    logits = theirs(adapted)
    assert np.linalg.norm(logits - plain) > 0.1 * np.linalg.norm(plain)
    assert_close(ours(join(params, adapters, lora), cfg=cfg), logits)

    merged = merge(params, adapters, lora)
    assert_close(ours(merged, cfg=cfg), logits)
    hf.save(tmp_path / "merged", merged, cfg, family=family)
    assert_close(theirs(type(model).from_pretrained(tmp_path / "merged", attn_implementation="eager")), logits)

    found, again = hf_lora.load(tmp_path / "ours", cfg, family=family)
    assert_equal(again, adapters)
    assert (found.rank, found.scale, set(found.targets)) == (lora.rank, lora.scale, set(lora.targets))
    adapted.save_pretrained(tmp_path / "through_peft")
    assert_equal(hf_lora.load(tmp_path / "through_peft", cfg, family=family)[1], adapters)


def _check_peft_in_ours(family, cfg, params, plain, tmp_path):
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(make(family), settings)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    logits = theirs(adapted)
    assert np.linalg.norm(logits - plain) > 0.1 * np.linalg.norm(plain)
    lora, adapters = hf_lora.load(tmp_path / "theirs", cfg, family=family)
    assert lora.rslora and lora.scale == 3.0
    assert_close(ours(join(params, adapters, lora), cfg=cfg), logits)

    hf_lora.save(tmp_path / "back", adapters, lora, cfg, family=family)
    expected, found = (load_file(tmp_path / name / hf_lora.TENSORS) for name in ("theirs", "back"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_initial_adapters_have_pefts_distribution(tmp_path):
    layer = torch.nn.Linear(400, 300, bias=False)
    adapted = peft.get_peft_model(torch.nn.Sequential(layer), peft.LoraConfig(r=64, target_modules=["0"]))
    a = adapted.base_model.model[0].lora_A.default.weight.detach().numpy()
    spec = lora_spec({"up": {"kernel": specs.Param((400, 300), ("embed", "mlp"), normal(1.0))}}, LoraConfig(rank=64))
    got = specs.init(jax.random.key(0), spec)["up"]["lora_a"]
    assert np.std(got) == pytest.approx(np.std(a), rel=0.02)
    assert np.abs(got).max() == pytest.approx(np.abs(a).max(), rel=0.01)
