"""Continuous thoughts: a prefill and k steps are k + 1 passes over everything, in states, gradients and text."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate.latent import roll_thoughts
from jaxlm.models import decoder, thoughts
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig

V, T, END = 30, 4, 7
CFG = DecoderConfig(
    vocab_size=V, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, max_length=64
)
LENGTHS = (5, 2)
SEGMENTS = (np.arange(6) < np.array(LENGTHS)[:, None]).astype(np.int32)
QUESTION = np.random.default_rng(0).integers(8, V, (2, 6)) * SEGMENTS
TOKENS = np.array([[END, 9, 8, 10], [END, 11, 0, 0]])
THERE = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])


def params_of(pause):
    params = specs.init(jax.random.key(0), thoughts.spec(CFG, pause=pause))
    return jax.tree.map(
        lambda x: 6 * x if x.ndim > 1 else x + 1.0 * (x.shape == (16,)) * jnp.cos(jnp.arange(16.0)), params
    )


def by_passes(params, b, number, tokens):
    """Coconut as it is defined: a pass over everything for each thought, without a cache."""
    model = params["model"]
    read = decoder.embed_tokens(model, QUESTION[b : b + 1, : LENGTHS[b]], cfg=CFG)
    for _ in range(number):
        last = decoder.forward(model, None, embeddings=read, cfg=CFG).hidden[:, -1:]
        read = jnp.concatenate([read, params["pause"][None, None] if "pause" in params else last], axis=1)
    read = jnp.concatenate([read, decoder.embed_tokens(model, np.array([tokens]), cfg=CFG)], axis=1)
    return decoder.forward(model, None, embeddings=read, cfg=CFG).hidden[0, -len(tokens) :]


@pytest.mark.parametrize("pause", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["coconut", "pause"])
def test_a_prefill_and_steps_are_passes_over_everything(pause):
    params = params_of(pause)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def once(params):
        states = thoughts.states_after(params, QUESTION, SEGMENTS, TOKENS, THERE, cfg=CFG, number=3)
        return jnp.sum(jnp.sin(states) * THERE[..., None]), states

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def often(params):
        states = [by_passes(params, b, 3, TOKENS[b, : THERE[b].sum()]) for b in range(2)]
        return sum(jnp.sum(jnp.sin(x)) for x in states), states

    (_, found), grad = once(params)
    (_, expected), other = often(params)
    for b in range(2):
        np.testing.assert_allclose(found[b, : THERE[b].sum()], expected[b], rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(np.abs(b).max()))


@pytest.mark.slow
def test_text_after_thoughts_is_greedy():
    params = params_of(False)
    found = roll_thoughts(params, QUESTION, SEGMENTS, cfg=CFG, number=2, end_id=END, max_tokens=T)
    unembed = decoder.head(params["model"], cfg=CFG)["unembed"]
    for b in range(2):
        text = [END]
        for _ in range(T):
            text.append(int(jnp.argmax(by_passes(params, b, 2, text)[-1] @ unembed.T)))
        assert np.asarray(found.tokens[b]).tolist() == text[1:]


def test_thoughts_differ_from_pauses_and_their_number_counts():
    found = [
        thoughts.states_after(params_of(pause), QUESTION, SEGMENTS, TOKENS, THERE, cfg=CFG, number=number)
        for pause, number in [(False, 1), (False, 2), (True, 2)]
    ]
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[1], found[2])
