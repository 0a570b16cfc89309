"""The masked-LM loss of a tiny encoder: any split of a batch adds up, masks and dropout are their own, it learns."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.losses import mask_tokens
from jaxlm.models import encoder, masked_lm
from jaxlm.models.config import EncoderConfig, MaskedLMConfig
from jaxlm.models.spec import init
from jaxlm.train.masked_lm import make_masked_lm_loss

CFG = EncoderConfig(
    vocab_size=20, width=16, num_layers=1, num_heads=2, mlp_width=16, max_length=16, num_token_types=0, dropout=0.1,
    masked_lm=MaskedLMConfig(),
)  # fmt: skip


def forward(params, tokens, *, segments, key):
    hidden = encoder.forward(params, tokens, cfg=CFG, segments=segments, key=key).hidden
    return masked_lm.transform(params, hidden, cfg=CFG)


mask = partial(mask_tokens, mask_id=3, vocab_size=20, special_ids=(0, 1, 2, 3), rate=0.3)
loss_fn = make_masked_lm_loss(forward, partial(masked_lm.head, cfg=CFG), mask, scale=0.1)
value_and_grad = jax.jit(jax.value_and_grad(lambda *args: (lambda t, *rest: (t, rest))(*loss_fn(*args)), has_aux=True))


@pytest.fixture(scope="module")
def params():
    return init(jax.random.key(0), encoder.spec(CFG))


def batch(rows=slice(None)):
    """Each row repeats one token, so that what is masked can be guessed from its neighbours."""
    tokens = np.repeat(np.arange(4, 12)[:, None], 12, axis=1)
    segments = (np.arange(12) < np.arange(5, 13)[:, None]).astype(np.int32)
    return {"tokens": jnp.asarray(tokens)[rows], "segments": jnp.asarray(segments)[rows]}


@pytest.mark.slow
def test_two_halves_of_a_batch_add_up_to_it(params):
    keys = jax.random.split(jax.random.key(1), 8)
    (total, (weight, metrics)), grads = value_and_grad(params, batch(), keys)
    halves = [value_and_grad(params, batch(rows), keys[rows]) for rows in (slice(4), slice(4, 8))]
    np.testing.assert_allclose(sum(value for (value, _), _ in halves), total, rtol=1e-5)
    assert sum(aux[0] for (_, aux), _ in halves) == weight > 5
    np.testing.assert_allclose(metrics["masked_lm"][0] * 0.1, total, rtol=1e-6)
    for whole, *parts in zip(jax.tree.leaves(grads), *(jax.tree.leaves(g) for _, g in halves), strict=True):
        np.testing.assert_allclose(sum(parts), whole, atol=1e-5)


def test_without_keys_every_call_is_the_same(params):
    """The masks are those of one fixed key, and there is no dropout."""
    without = value_and_grad(params, batch(), None)[0]
    (_, (weight, _)), _ = value_and_grad(params, batch(), jax.random.split(jax.random.key(1), 8))
    assert np.isfinite(without[0]) and without[1][0] != weight


def test_it_learns_to_read_the_neighbours(params):
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params, state, key):
        (_, (weight, metrics)), grads = value_and_grad(params, batch(), jax.random.split(key, 8))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics["masked_lm"][0] / weight

    state = optimizer.init(params)
    for i in range(100):
        params, state, nats = step(params, state, jax.random.key(i))
    assert nats < 1.0 < np.log(8)
