"""Scores of packed responses: sums by segment, packed equals unpacked, what is masked changes nothing, ld_alpha."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import losses
from jaxlm.data import pipeline
from jaxlm.data.collate import make_row
from jaxlm.models import decoder
from jaxlm.ops.token_stats import TokenStats
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.preference import make_scorer, segment_sums

SETUP = runpy.run_path(str(Path(__file__).with_name("preference_setup.py")))
CFG, LENGTH, SCORE, params_of, packed = (SETUP[name] for name in ("CFG", "LENGTH", "SCORE", "params_of", "packed"))


def documents_of(data: pipeline.Datasets) -> dict[tuple[int, int], object]:
    """(row, slot) -> the document that lies there."""
    rows = data.train.sources[0]
    return {
        (r, s): rows.corpus[piece.document] for r in range(len(rows.plan)) for s, piece in enumerate(rows.pieces(r))
    }


def test_the_batch_is_ragged_and_has_empty_slots(packed):
    """What the other tests rely on."""
    data, batch, _, policy, _ = packed
    lengths = np.asarray(policy.length)
    assert len({len(rows) for rows in data.train.sources[0].plan}) > 1
    assert len(np.unique(lengths[lengths > 0])) > 4
    assert (lengths[-1] == 0).all() and (lengths[:-1, 0] > 0).all()
    assert (lengths == 0).sum() > lengths.shape[1]
    assert (batch["segments"][:-1] == 0).any()


def test_segment_sums_against_a_loop():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    segments = np.sort(rng.integers(0, 7, (5, 40)), axis=1)[:, ::-1].astype(np.int32)
    segments[0] = rng.integers(0, 9, 40)  # in any order, and beyond the slots
    segments[1] = 0
    x[:, :2] = np.where(segments[:, :2] == 0, np.nan, x[:, :2])
    expected = np.zeros((5, 6))
    for b in range(5):
        for t in range(40):
            if 1 <= segments[b, t] <= 6:
                expected[b, segments[b, t] - 1] += np.float64(x[b, t])
    got = segment_sums(jnp.asarray(np.where(segments == 0, np.nan, x)), jnp.asarray(segments), 6)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(got[1], 0)
    half = segment_sums(jnp.ones((1, 4000), jnp.bfloat16), jnp.ones((1, 4000), jnp.int32), 1)
    assert half.dtype == jnp.float32 and float(half[0, 0]) == 4000  # which bfloat16 cannot count to


@pytest.fixture(scope="module")
def singles(packed):
    """Every document alone in a row, and its tokens' statistics."""
    rows = [make_row([(d, 0, len(d.tokens) - 1)], LENGTH) for d in documents_of(packed[0]).values()]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch, jax.jit(lambda p: SCORE(p, batch, None, ("logprob", "entropy")))(params_of(0))


def test_packed_equals_unpacked(packed, singles):
    data, _, _, policy, _ = packed
    batch, stats = singles
    documents = documents_of(data)
    assert len(documents) == 18
    alone = make_scorer(lambda *_: stats, slots=1)(None, batch, None)
    for n, (r, s) in enumerate(documents):
        for field in ("logprob", "entropy"):
            got, want = getattr(policy, field)[r, s], getattr(alone, field)[n, 0]
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5, err_msg=f"{field} of {documents[r, s].origin}")
        assert policy.length[r, s] == alone.length[n, 0] == documents[r, s].mask.sum()
    empty = np.ones(policy.length.shape, bool)
    empty[tuple(np.array(list(documents)).T)] = False
    for field in policy._fields:
        np.testing.assert_array_equal(getattr(policy, field)[empty], 0, err_msg=field)


def test_sums_are_those_of_a_plain_softmax(packed):
    """Against logits of single rows in float64, so that the scorer is not compared with itself."""
    data, _, _, policy, _ = packed
    documents = documents_of(data)
    tokens = np.zeros((len(documents), LENGTH), np.int32)
    for n, d in enumerate(documents.values()):
        tokens[n, : len(d.tokens)] = d.tokens  # what follows, no token of it can see
    hidden = jax.jit(lambda p: decoder.forward(p, tokens, cfg=CFG).hidden)(params_of(0))
    logits = np.asarray(hidden, np.float64) @ np.asarray(params_of(0)["embed"]["table"], np.float64).T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for n, ((r, s), d) in enumerate(documents.items()):
        at = np.flatnonzero(d.mask) - 1
        np.testing.assert_allclose(policy.logprob[r, s], logp[n, at, d.tokens[at + 1]].sum(), rtol=1e-6, atol=1e-5)
        entropy = -(np.exp(logp[n, at]) * logp[n, at]).sum()
        np.testing.assert_allclose(policy.entropy[r, s], entropy, rtol=1e-6, atol=1e-5)


def test_what_is_masked_or_padding_changes_nothing(packed):
    _, batch, score, policy, _ = packed
    rng = np.random.default_rng(1)
    masked = ~batch["mask"]
    padding = batch["segments"] == 0
    assert masked[~padding].any() and padding[:-1].any()
    changed = dict(batch)
    changed["targets"] = np.where(masked, rng.integers(0, 259, masked.shape), batch["targets"]).astype(np.int32)
    changed["inputs"] = np.where(padding, rng.integers(0, 259, masked.shape), batch["inputs"]).astype(np.int32)
    changed["positions"] = np.where(padding, 7, batch["positions"]).astype(np.int32)
    for field, want in zip(policy._fields, policy):
        np.testing.assert_array_equal(getattr(score(params_of(0), changed, None), field), want, err_msg=field)


def test_a_prompt_token_changes_its_own_segment_alone(packed):
    _, batch, score, policy, _ = packed
    row = 0
    for segment in (1, 2, 3):
        at = int(np.flatnonzero(batch["segments"][row] == segment)[0]) + 1  # the token after the begin token
        assert not batch["mask"][row, at - 1]
        changed = dict(batch, inputs=batch["inputs"].copy())
        changed["inputs"][row, at] = ord("~")
        got = score(params_of(0), changed, None)
        differs = np.asarray(got.logprob != policy.logprob)
        assert np.argwhere(differs).tolist() == [[row, segment - 1]]
        assert np.argwhere(np.asarray(got.entropy != policy.entropy)).tolist() == [[row, segment - 1]]


def test_a_prompts_weight_is_in_no_gradient_of_another_segment(packed):
    """By gradients of embeddings: the loss of one slot reads its own row and segment."""
    data, batch, _, _, _ = packed
    table = params_of(0)["embed"]["table"]

    def one(embeddings):
        hidden = decoder.forward(
            params_of(0), None, cfg=CFG, embeddings=embeddings, positions=batch["positions"], segments=batch["segments"]
        ).hidden
        score = make_hidden_scorer(lambda *_, **__: hidden, partial(decoder.head, cfg=CFG))
        return make_scorer(score, slots=data.slots)(params_of(0), batch, None).logprob[1, 1]

    grads = jax.jit(jax.grad(one))(table[batch["inputs"]])
    touched = np.asarray(jnp.abs(grads).sum(-1) > 0)
    here = (np.arange(len(touched))[:, None] == 1) & (batch["segments"] == 2)
    last = np.flatnonzero(here[1])[-1]
    assert touched[here].all() and not touched[~here].any() and batch["mask"][1, last]


@pytest.mark.parametrize("ld_alpha", [0.0, 0.5, 1.0])
def test_ld_alpha_packed_equals_the_loss_function_unpacked(packed, singles, ld_alpha):
    data, batch, _, policy, _ = packed
    documents, (single, alone) = list(documents_of(data)), singles
    tokens = np.zeros(batch["mask"].shape, np.float32)  # the same numbers, token by token, where they lie packed
    for n, (r, s) in enumerate(documents):
        here = batch["segments"][r] == s + 1
        tokens[r, here] = np.asarray(alone.logprob)[n, : here.sum()]
    stats = TokenStats(jnp.asarray(tokens), jnp.zeros(tokens.shape), None)
    got = make_scorer(lambda *_: stats, slots=data.slots, ld_alpha=ld_alpha)(None, batch, None)
    np.testing.assert_array_equal(got.length, policy.length)
    assert [s % 2 for _, s in documents] == [0, 1] * 9  # chosen and rejected, in turn
    chosen, rejected = single["mask"][::2], single["mask"][1::2]
    assert (chosen.sum(1) > rejected.sum(1)).any() and (chosen.sum(1) < rejected.sum(1)).any()
    expected = losses.length_desensitised_sums(
        alone.logprob[::2], alone.logprob[1::2], chosen_mask=chosen, rejected_mask=rejected, ld_alpha=ld_alpha
    )
    for n, (r, s) in enumerate(documents):
        np.testing.assert_allclose(got.logprob[r, s], expected[n % 2][n // 2], rtol=1e-6, atol=1e-6)
    change = float(jnp.abs(got.logprob - policy.logprob).max())
    assert change < 1e-4 if ld_alpha == 1 else change > 1
    assert not got.logprob[-1].any()
