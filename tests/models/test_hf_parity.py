"""Every family against transformers: logits, gradients, and the way back, on tiny random models in float32."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxlm.losses.lm import cross_entropy  # noqa: E402
from jaxlm.models import decoder, hf, hf_files, hf_names  # noqa: E402
from jaxlm.models.spec import flatten  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers' and torch's own; ours are errors in every other file
]

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=64)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=1e4,
              original_max_position_embeddings=16)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)


def longrope(n):
    return dict(rope_type="longrope", short_factor=[1.0 + 0.1 * i for i in range(n)], rope_theta=1e4,
                long_factor=[2.0 + 0.5 * i for i in range(n)], original_max_position_embeddings=24)  # fmt: skip


FAMILIES = {
    "llama": ("Llama", SMALL | dict(rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "llama_biased": ("Llama", SMALL | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama_yarn": ("Llama", SMALL | dict(rope_parameters=YARN)),
    "llama_linear": ("Llama", SMALL | dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))),
    "mistral": ("Mistral", SMALL | dict(sliding_window=7, head_dim=16)),
    "qwen2": ("Qwen2", SMALL | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", SMALL | dict(head_dim=16)),
    "gemma2": (
        "Gemma2",
        SMALL
        | dict(
            head_dim=16,
            sliding_window=7,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),  # fmt: skip
    "gemma3_text": (
        "Gemma3",
        SMALL | dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=24, num_hidden_layers=7),
    ),
    "olmo2": ("Olmo2", SMALL),
    "gpt2": ("GPT2", dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "phi3_long": (
        "Phi3",
        SMALL
        | dict(rope_parameters=longrope(4), original_max_position_embeddings=24, pad_token_id=0, sliding_window=9),
    ),  # fmt: skip
    "phi3_partial": (
        "Phi3",
        SMALL
        | dict(
            hidden_size=64,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
            pad_token_id=0,
        ),
    ),  # fmt: skip
}


def make(family):
    prefix, settings = FAMILIES[family]
    name = prefix + ("TextConfig" if prefix == "Gemma3" else "Config")
    config = getattr(transformers, name)(**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, prefix + ("LMHeadModel" if prefix == "GPT2" else "ForCausalLM"))(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mix-up would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def ours(params, tokens, cfg):
    hidden = decoder.forward(params, tokens, cfg=cfg).hidden
    head = decoder.head(params, cfg=cfg)
    logits = hidden @ head["unembed"].T
    return logits if head["soft_cap"] is None else head["soft_cap"] * jnp.tanh(logits / head["soft_cap"])


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_the_way_back(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = hf.load(tmp_path / "theirs")
    for length in (20, 40) if family == "phi3_long" else (40,):  # beyond every window; LongRoPE in both its regimes
        tokens = np.random.default_rng(length).integers(0, 97, (2, length))
        with torch.no_grad():
            expected = model(torch.tensor(tokens)).logits.numpy()
        got = np.asarray(ours(params, jnp.asarray(tokens), cfg))
        assert relative(got, expected) < 1e-5
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    _check_gradients(model, params, cfg, tokens, model.config.model_type)

    hf.save(tmp_path / "back", params, cfg, family=model.config.model_type)
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info.get("mismatched_keys")
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(torch.tensor(tokens)).logits.numpy(), expected)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)
    cfg_again, params_again = hf.load(tmp_path / "back")
    assert cfg_again == cfg
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(flatten(params_again)[path], x, err_msg=path)


def _check_gradients(model, params, cfg, tokens, family):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(torch.tensor(inputs)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten()).backward()

    def loss(params):
        hidden = decoder.forward(params, jnp.asarray(inputs), cfg=cfg).hidden
        head = decoder.head(params, cfg=cfg)
        return cross_entropy(hidden, head["unembed"], jnp.asarray(targets), soft_cap=head["soft_cap"]).mean()

    grads = flatten(jax.jit(jax.grad(loss))(params))
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    largest = max(np.linalg.norm(g) for g in theirs.values())
    for row in hf_names.rows(family, cfg):
        for i in range(cfg.num_layers if "{i}" in row.tensor else 1):
            parts = [np.asarray(grads[p][i] if "{i}" in row.tensor else grads[p]) for p in row.paths]
            expected = theirs[row.tensor.format(i=i)]
            error = np.linalg.norm(hf_names.to_tensor(row, parts) - expected)
            # Key biases have no gradient but rounding (softmax ignores a shift), hence the second bound.
            assert error < max(1e-4 * np.linalg.norm(expected), 1e-6 * largest), row.tensor


def test_greedy_generation_is_the_same(tmp_path):
    from jaxlm.data.tokenizer import ByteTokenizer
    from jaxlm.generate.sample import SamplingConfig, generate

    model = make("qwen3")
    model.save_pretrained(tmp_path / "m")
    cfg, params = hf.load(tmp_path / "m")
    prompt = [5, 17, 3, 88, 41]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    got = generate(params, [prompt], cfg=cfg, sampling=SamplingConfig(max_new_tokens=16, temperature=0.0),
                   tokenizer=ByteTokenizer(), eos_ids=())[0]  # fmt: skip
    assert got.tokens.tolist() == expected[0, len(prompt) :].tolist()


def test_sharded_and_bf16_files_both_ways(tmp_path):
    model = make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / hf_files.INDEX).is_file()
    cfg, params = hf.load(tmp_path / "theirs", dtype=None)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    hf.save(tmp_path / "back", params, cfg, max_shard_bytes=20_000)
    assert len(json.loads((tmp_path / "back" / hf_files.INDEX).read_text())["weight_map"]) == len(model.state_dict())
    again = type(model).from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
