"""What must hold for every family: its parameters, causality, packing, the cache, scanning."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models.cache import init_cache

TOKENS = jax.random.randint(jax.random.key(7), (2, 11), 0, 29)


@partial(jax.jit, static_argnames=("cfg", "collect"))
def forward(params, tokens, *, cfg, **options):
    return decoder.forward(params, tokens, cfg=cfg, **options)


def test_packing_changes_nothing(family, make_params):
    params = make_params(family)
    alone = forward(params, TOKENS[:1], cfg=family).hidden[0]
    short = forward(params, TOKENS[1:, :5], cfg=family).hidden[0]
    row = jnp.concatenate([TOKENS[1, :5], TOKENS[0], jnp.zeros(3, TOKENS.dtype)])[None]
    segments = jnp.array([[4] * 5 + [2] * 11 + [0] * 3])
    packed = forward(params, row, cfg=family, segments=segments).hidden[0]
    np.testing.assert_allclose(packed[:5], short, atol=1e-5)
    np.testing.assert_allclose(packed[5:16], alone, atol=1e-5)
    assert np.all(np.isfinite(packed[16:]))


def test_no_token_sees_a_later_one(family, make_params):
    family = dataclasses.replace(family, max_length=64)
    params = make_params(family)
    changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % family.vocab_size)
    before, after = (np.asarray(forward(params, t, cfg=family).hidden) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-2


def test_prefill_of_different_lengths_and_decode_equal_the_full_forward(family, make_params):
    params, lengths = make_params(family), jnp.array([6, 3])
    limit = 8 if family.rope and family.rope.scaling == "longrope" else 11  # its factors change beyond
    full = forward(params, TOKENS[:, :limit], cfg=family).hidden
    segments = (jnp.arange(6) < lengths[:, None]).astype(jnp.int32)
    prompt = jnp.where(segments == 1, TOKENS[:, :6], 0)
    out = forward(params, prompt, cfg=family, segments=segments, cache=init_cache(family, 2, 14))
    for row, length in enumerate([6, 3]):
        np.testing.assert_allclose(out.hidden[row, :length], full[row, :length], atol=1e-5)
    for _ in range(limit - 6):
        at = out.cache.length
        token = jnp.take_along_axis(TOKENS, at[:, None], axis=1)
        out = forward(params, token, cfg=family, cache=out.cache)
        want = jnp.take_along_axis(full, at[:, None, None], axis=1)
        np.testing.assert_allclose(out.hidden, want, atol=1e-5)
    np.testing.assert_array_equal(out.cache.length, lengths + limit - 6)


# One family without a layer pattern and one with stand for the others, which are scanned by the same code.
FIRST = ("llama3", "gemma2")
OTHERS = (
    "llama2", "smollm", "mistral", "qwen2", "qwen2_yarn", "qwen3", "olmo2", "phi3", "gemma3", "gpt2",
)  # fmt: skip


@pytest.mark.parametrize(
    "family", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)], indirect=True
)
def test_scanning_equals_unrolling(family, make_params):
    params = make_params(family)
    unrolled = dataclasses.replace(family, scan_layers=False)

    def loss(params, cfg):
        return jnp.sum(jnp.sin(decoder.forward(params, TOKENS, cfg=cfg).hidden))

    values, gradients = zip(
        *(jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, c) for c in (family, unrolled))
    )
    assert float(values[0]) == pytest.approx(float(values[1]), abs=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), *gradients)
    zero = [g for g in jax.tree.leaves(gradients[0]["layers"]) if not np.any(np.asarray(g))]
    assert not zero  # every parameter of every block is used


PUBLISHED = {  # family -> parameters that the narrowed model must have beside those of Llama, and without which of them
    "llama2": (set(), set()),
    "smollm": (set(), {"unembed/table"}),
    "qwen2": ({f"layers/attn/{n}/bias" for n in "qkv"}, set()),
    "qwen3": ({"layers/attn/q_norm/scale", "layers/attn/k_norm/scale"}, set()),
    "olmo2": (
        {"layers/attn/q_norm/scale", "layers/attn/k_norm/scale"}
        | {"layers/attn_post_norm/scale", "layers/mlp_post_norm/scale"},
        {"layers/attn_norm/scale", "layers/mlp_norm/scale"},
    ),
    "gemma2": ({"layers/attn_post_norm/scale", "layers/mlp_post_norm/scale"}, {"unembed/table"}),
    "gpt2": (
        {"positions/table", "final_norm/bias", "layers/attn_norm/bias", "layers/mlp_norm/bias"}
        | {f"layers/attn/{n}/bias" for n in ("q", "k", "v", "out")}
        | {"layers/mlp/up/bias", "layers/mlp/down/bias"},
        {"unembed/table", "layers/mlp/gate/kernel"},
    ),
}
LLAMA = {
    "embed/table": (29, 16),
    "unembed/table": (29, 16),
    "final_norm/scale": (16,),
    "layers/attn_norm/scale": (3, 16),
    "layers/mlp_norm/scale": (3, 16),
    "layers/attn/q/kernel": (3, 16, 4, 4),
    "layers/attn/k/kernel": (3, 16, 4, 4),
    "layers/attn/v/kernel": (3, 16, 4, 4),
    "layers/attn/out/kernel": (3, 4, 4, 16),
    "layers/mlp/gate/kernel": (3, 16, 24),
    "layers/mlp/up/kernel": (3, 16, 24),
    "layers/mlp/down/kernel": (3, 24, 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_names(name, families, paths):
    extra, absent = PUBLISHED[name]
    got = paths(decoder.spec(families[name]))
    assert set(got) == (set(LLAMA) | extra) - absent
    if name == "llama2":
        assert got == LLAMA


def test_shapes_of_grouped_heads_biases_and_norms(families, paths):
    olmo, qwen2, qwen3, gpt2 = (paths(decoder.spec(families[n])) for n in ("olmo2", "qwen2", "qwen3", "gpt2"))
    assert olmo["layers/attn/q_norm/scale"] == (3, 16) and olmo["layers/attn/k_norm/scale"] == (3, 8)
    assert qwen3["layers/attn/q_norm/scale"] == (3, 8) and qwen3["layers/attn/k_norm/scale"] == (3, 8)
    assert qwen2["layers/attn/q/bias"] == (3, 4, 4) and qwen2["layers/attn/k/bias"] == (3, 2, 4)
    assert gpt2["positions/table"] == (32, 16) and gpt2["layers/attn/out/bias"] == (3, 16)
    assert gpt2["layers/mlp/up/bias"] == (3, 24) and gpt2["layers/mlp/down/bias"] == (3, 16)


def test_head(family, make_params):
    params = make_params(family)
    got = decoder.head(params, cfg=family)
    assert got["unembed"] is params["embed" if family.tie_embeddings else "unembed"]["table"]
    assert got["bias"] is None and got["soft_cap"] == family.final_soft_cap
