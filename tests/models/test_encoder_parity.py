"""Encoders against transformers: hidden states, the pooler, gradients, and the way back, on tiny random models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxlm import losses  # noqa: E402
from jaxlm.models import encoder, hf_encoder, hf_names, masked_lm, pooling  # noqa: E402
from jaxlm.models.config import MaskedLMConfig  # noqa: E402
from jaxlm.models.spec import flatten  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own

BERT = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=40)  # fmt: skip
DISTIL = dict(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40)
# Five layers: global, local, local, global, local; the longer row outgrows the window of 4 on either side.
MODERN = dict(vocab_size=97, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=48,
              max_position_embeddings=40, local_attention=8, pad_token_id=1, bos_token_id=2, eos_token_id=3,
              cls_token_id=2, sep_token_id=3)  # fmt: skip
THETAS = dict(full_attention={"rope_type": "default", "rope_theta": 500.0},
              sliding_attention={"rope_type": "default", "rope_theta": 20.0})  # fmt: skip
BIASES = dict(norm_bias=True, attention_bias=True, mlp_bias=True)
FAMILIES = {
    "bert": ("Bert", BERT),
    "minilm": ("Bert", BERT | dict(hidden_size=24, hidden_act="gelu_new", layer_norm_eps=1e-5)),
    "roberta": ("Roberta", BERT | dict(type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)),
    "distilbert": ("DistilBert", DISTIL),
    "modernbert": ("ModernBert", MODERN),
    "modernbert_biases": (
        "ModernBert",
        MODERN | BIASES | dict(rope_parameters=THETAS, layer_types=["sliding_attention"] + ["full_attention"] * 4),
    ),
}
VARIANTS = ("minilm", "modernbert_biases")
LENGTHS = (20, 7)


def make(family, kind="Model"):
    prefix, settings = FAMILIES[family]
    config = getattr(transformers, prefix + "Config")(**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, prefix + kind)(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mix-up would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(mask, rng.integers(2, 97, mask.shape), 1), mask


def theirs(model, tokens, mask, **extra):
    return model(torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True, **extra)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in FAMILIES]
)
def test_states_gradients_and_the_way_back(family, tmp_path):
    model, (tokens, mask) = make(family), batch()
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = hf_encoder.load(tmp_path / "theirs")
    out = encoder.forward(params, jnp.asarray(tokens), cfg=cfg, segments=jnp.asarray(mask, jnp.int32), states=True)
    expected = theirs(model, tokens, mask)
    for ours, want in zip(out.states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(np.asarray(ours)[mask], want.detach().numpy()[mask], atol=2e-5)
    if cfg.head:
        pooled = pooling.head(params["head"], pooling.first(out.hidden, jnp.asarray(mask)))
        np.testing.assert_allclose(pooled, expected.pooler_output.detach().numpy(), atol=2e-5)
    _check_gradients(model, params, cfg, tokens, mask)

    hf_encoder.save(tmp_path / "back", params, cfg)
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info.get("mismatched_keys")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)
    again_out = theirs(again.eval(), tokens, mask).last_hidden_state
    np.testing.assert_array_equal(again_out.detach().numpy(), expected.last_hidden_state.detach().numpy())
    cfg_again, params_again = hf_encoder.load(tmp_path / "back")
    assert cfg_again == cfg
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(flatten(params_again)[path], x, err_msg=path)


def _check_gradients(model, params, cfg, tokens, mask):
    """Of the mean-pooled vectors against a fixed direction."""
    direction = np.random.default_rng(1).normal(size=(len(tokens), cfg.width)).astype(np.float32)
    hidden = theirs(model, tokens, mask).last_hidden_state
    kept = torch.tensor(mask)[..., None]
    ((hidden * kept).sum(1) / kept.sum(1) * torch.tensor(direction)).sum().backward()

    def loss(params):
        out = encoder.forward(params, jnp.asarray(tokens), cfg=cfg, segments=jnp.asarray(mask, jnp.int32))
        return jnp.sum(pooling.mean(out.hidden, jnp.asarray(mask)) * direction)

    _compare_gradients(model, jax.jit(jax.grad(loss))(params), cfg)


def _compare_gradients(model, grads, cfg):
    """Tensor by tensor; the pooler is part of no loss here."""
    grads = flatten(grads)
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(np.linalg.norm(g) for g in found.values())
    checked = 0
    for row in hf_encoder.layout(model.config.model_type, cfg).rows:
        for i, name in enumerate(row.names(cfg.num_layers)):
            parts = [np.asarray(grads[p][i] if "{i}" in row.tensor else grads[p]) for p in row.paths]
            if name.startswith("pooler"):
                assert name not in found and not np.any(parts[0])
                continue
            error = np.linalg.norm(hf_names.to_tensor(row, parts) - found[name])
            # Key biases have no gradient but rounding (softmax ignores a shift), hence the second bound.
            assert error < max(1e-4 * np.linalg.norm(found[name]), 1e-6 * largest), name
            checked += 1
    assert checked == len(found)


MASKED_LM = ["minilm", "roberta", "distilbert", "modernbert"]


@pytest.mark.parametrize("family", MASKED_LM)
def test_a_masked_language_models_logits_gradients_and_the_way_back(family, tmp_path):
    model, (tokens, mask) = make(family, "ForMaskedLM"), batch()
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = hf_encoder.load(tmp_path / "theirs")
    assert not cfg.head and cfg.masked_lm == MaskedLMConfig(
        "gelu_tanh" if family == "minilm" else "gelu", dense_bias=family != "modernbert"
    )
    chosen = (np.random.default_rng(2).random(mask.shape) < 0.3) & mask
    labels = torch.tensor(np.where(chosen, tokens, -100))
    expected = theirs(model, tokens, mask, labels=labels)
    expected.loss.backward()

    def mean_loss(params):
        out = encoder.forward(params, jnp.asarray(tokens), cfg=cfg, segments=jnp.asarray(mask, jnp.int32))
        states, head = masked_lm.transform(params, out.hidden, cfg=cfg), masked_lm.head(params, cfg=cfg)
        total, weight, _ = losses.masked_lm(states, targets=jnp.asarray(tokens), chosen=jnp.asarray(chosen), **head)
        return total / weight, states @ head["unembed"].T + head["bias"]

    (loss, logits), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
    want = expected.logits.detach().numpy()[mask]
    np.testing.assert_allclose(np.asarray(logits)[mask], want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(loss, expected.loss.item(), rtol=1e-5)
    _compare_gradients(model, grads, cfg)

    hf_encoder.save(tmp_path / "back", params, cfg)
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info.get("mismatched_keys")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)
    assert again.config.architectures == [type(model).__name__]
    assert hf_encoder.load(tmp_path / "back")[0] == cfg


def test_a_head_of_its_own_or_of_another_task_is_left_out(tmp_path):
    """An untied head has a matrix that jaxlm does not keep; ModernBERT's classifiers have the head's names."""
    for name, kind, changes in (
        ("minilm", "ForMaskedLM", dict(tie_word_embeddings=False)),
        ("modernbert", "ForSequenceClassification", {}),
    ):
        prefix, settings = FAMILIES[name]
        config = getattr(transformers, prefix + "Config")(**settings, **changes)
        getattr(transformers, prefix + kind)(config).save_pretrained(tmp_path / name)
        cfg, params = hf_encoder.load(tmp_path / name)
        assert cfg.masked_lm is None and "masked_lm" not in params
        with pytest.raises(ValueError, match="has no masked-LM head"):
            masked_lm.head(params, cfg=cfg)


def test_a_stored_copy_of_a_tied_matrix_must_be_one(tmp_path):
    make("roberta", "ForMaskedLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert hf_encoder.load_config(tmp_path).masked_lm is not None
    hf_encoder.load(tmp_path)
    tensors["lm_head.decoder.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.decoder.weight differs from roberta.embeddings.word_embeddings"):
        hf_encoder.load(tmp_path)


def test_the_older_names_of_norms_are_read(tmp_path):
    model = make("bert", "ForMaskedLM")
    model.save_pretrained(tmp_path)
    cfg, params = hf_encoder.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    older = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, tmp_path / "model.safetensors")
    cfg_again, params_again = hf_encoder.load(tmp_path)
    assert cfg_again == cfg
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(flatten(params_again)[path], x, err_msg=path)


def test_token_types_are_berts(tmp_path):
    model, (tokens, mask) = make("bert"), batch()
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = hf_encoder.load(tmp_path / "theirs")
    types = (np.arange(tokens.shape[1]) > 3).astype(np.int64) * np.ones_like(tokens)
    out = encoder.forward(
        params, jnp.asarray(tokens), cfg=cfg, segments=jnp.asarray(mask, jnp.int32), token_types=jnp.asarray(types)
    )
    want = theirs(model, tokens, mask, token_type_ids=torch.tensor(types)).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(np.asarray(out.hidden)[mask], want[mask], atol=2e-5)
