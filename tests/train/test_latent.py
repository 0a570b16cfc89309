"""Losses of the stages of sentence-by-sentence reasoning: what is counted, what moves, and what does not."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.reasoning import Sample, make_sample_rows
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.losses import latent_info_nce
from jaxlm.models import decoder, latent
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.train.latent import make_answer_loss, make_latent_loss, make_sentence_loss, make_thoughts_loss, sentences
from jaxlm.train.objectives import make_head_stats, make_hidden_nll

MODEL = DecoderConfig(
    vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32, max_length=64
)
CFG = latent.LatentConfig(MODEL, 16, 16, dropout=0.0)
HEAD = partial(decoder.head, cfg=MODEL)
STATS = make_head_stats(HEAD)
STATES = partial(latent.decoder_states, cfg=MODEL)
SAMPLES = [Sample("ab?", ("c", "de"), "f"), Sample("a?", (), "g"), Sample("long one?", ("cc",), "f")]


def apply(params, tokens, *, positions, segments, key):
    return decoder.forward(params, tokens, cfg=MODEL, segments=segments).hidden


def semantic(params, batch):
    tokens, segments = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("steps", "step_segments"))
    found = latent.encode_sentences(params, tokens, segments, cfg=MODEL)
    return found.reshape(*batch["steps"].shape[:2], -1)


def contextual(params, batch):
    text = batch["text/tokens"], batch["text/segments"], batch["ends"][:, :-1]
    return latent.encode_prefixes(params, *text, cfg=MODEL)


def predict(params, batch, vectors, mask, key):
    return latent.predict(params, batch["question/tokens"], batch["question/segments"], vectors, mask, cfg=CFG)


@pytest.fixture(scope="module")
def batch():
    rows, _ = make_sample_rows(
        SAMPLES, ByteTokenizer(), origin="toy", max_steps=4, max_step_tokens=7, max_question_tokens=16
    )
    found = [rows.row(i) for i in range(3)]
    return {name: jnp.stack([row[name] for row in found]) for name in found[0]}


@pytest.fixture(scope="module")
def params():
    return specs.init(jax.random.key(0), decoder.spec(MODEL))


def test_the_answer_loss_counts_what_follows_the_question(batch, params):
    total, weight, _ = jax.jit(make_answer_loss(make_hidden_nll(apply, HEAD)))(params, batch, None)
    counted = [len("\n".join([*s.sentences, ""]).encode()) for s in SAMPLES]
    assert weight == sum(counted)
    expected = 0.0
    for sample in SAMPLES:
        text = np.frombuffer("\n".join([sample.question, *sample.sentences, ""]).encode(), np.uint8).astype(np.int32)
        hidden = decoder.forward(params, text[None, :-1], cfg=MODEL).hidden[0]
        logp = jax.nn.log_softmax(hidden @ HEAD(params)["unembed"].T)
        nll = -np.asarray(logp)[np.arange(len(text) - 1), text[1:]]
        expected += nll[len(sample.question) :].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("vectors", [semantic, contextual], ids=lambda f: f.__name__)
def test_padding_and_missing_sentences_change_nothing(batch, params, vectors):
    loss = make_sentence_loss(vectors, STATES, STATS)
    spoilt = {
        name: jnp.where(batch[name.replace("tokens", "segments").replace("steps", "step_segments")] == 0, 77, x)
        if name.endswith(("tokens", "steps")) else x
        for name, x in batch.items()
    }  # fmt: skip
    run = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, None)[0]))
    (one, grad), (two, other) = run(params, batch), run(params, spoilt)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    alone = {name: x[:1] for name, x in batch.items()}
    count = float(batch["step_segments"].sum())
    per_sample = [float(run(params, {n: x[i : i + 1] for n, x in batch.items()})[0]) for i in range(3)]
    tokens = np.asarray(batch["step_segments"].sum(axis=(1, 2)))
    np.testing.assert_allclose(one / 3, (per_sample * tokens).sum() / count, rtol=1e-5)
    assert sentences(alone).tolist() == [[True, True, True, False]]


def test_the_contrast_draws_contextual_vectors_to_the_semantic_ones(batch, params):
    loss = jax.jit(make_sentence_loss(contextual, STATES, STATS, contrast_weight=0.5))
    target = jax.jit(semantic)(specs.init(jax.random.key(1), decoder.spec(MODEL)), batch)
    total, rows, metrics = loss(params, {**batch, "semantic": target}, None)
    there = sentences(batch)
    nce = latent_info_nce(jax.jit(contextual)(params, batch), target, mask=there, temperature=0.1)
    expected = metrics["nll"][0] + 0.5 * 3 * nce.sum() / there.sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert rows == 3


def test_of_sentences_that_are_not_there_the_decoder_reads_none(batch, params):
    def read(number):
        rows = []

        def states(params, vectors, tokens, segments):
            rows.append(len(tokens))
            return STATES(params, vectors, tokens, segments)

        loss = jax.jit(jax.value_and_grad(lambda p: make_sentence_loss(semantic, states, STATS, capacity=number)(
            p, batch, None)[0]))  # fmt: skip
        return loss(params), rows[0]

    (whole, grad), rows = read(None)
    (fewer, same), left = read(6)  # there are 3 + 1 + 2 sentences in 3 rows of 4 places
    assert (rows, left) == (12, 6)
    np.testing.assert_allclose(fewer, whole, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(same)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.isnan(read(5)[0][0])  # never one left out in silence


def test_the_latent_loss_is_the_sum_of_its_terms_and_reaches_both_mappers(batch, params):
    weights = {"nll": 1.0, "info_nce": 0.5, "tie": 2.0, "mse": 0.25, "stop": 0.5}
    frozen = specs.init(jax.random.key(1), decoder.spec(MODEL))
    trained = specs.init(jax.random.key(2), latent.spec(CFG))
    loss = jax.jit(make_latent_loss(predict, STATES, STATS, weights=weights))
    vectors = jax.jit(contextual)(params, batch)
    batch = {**batch, "vectors": vectors}
    total, rows, metrics = loss(trained, batch, None, frozen=frozen)
    assert sum(w * metrics[name][0] for name, w in weights.items()) == pytest.approx(float(total), rel=1e-6)
    found = jax.jit(predict)(trained, batch, vectors, sentences(batch), None)
    there = np.asarray(sentences(batch))
    tie = np.mean((np.asarray(found.output) - np.asarray(found.target)) ** 2, axis=-1)[there].mean()
    np.testing.assert_allclose(metrics["tie"][0] / rows, tie, rtol=1e-5)
    grad = jax.grad(lambda p: loss(p, batch, None, frozen=frozen)[0])(trained)
    for name in ("into", "out", "model", "stop"):
        assert np.abs(np.asarray(jax.tree.leaves(grad[name])[0])).max() > 0
    alone = jax.jit(make_latent_loss(predict, STATES, STATS, weights={"tie": 1.0}))
    tied = jax.grad(lambda p: alone(p, batch, None, frozen=frozen)[0])(trained)
    assert np.all(np.asarray(tied["out"]["up"]["kernel"]) == 0)


def test_the_classifier_learns_the_last_sentence_and_moves_nothing_else(batch, params):
    trained = specs.init(jax.random.key(2), latent.spec(CFG))
    loss = jax.jit(make_latent_loss(predict, STATES, STATS, weights={"stop": 1.0}))
    batch = {**batch, "vectors": jax.jit(contextual)(params, batch)}
    total, rows, _ = loss(trained, batch, None, frozen=params)
    found = predict(trained, batch, batch["vectors"], sentences(batch), None)
    x = np.asarray(latent.stop_logits(trained, found.output), np.float64)
    last = [len(s.sentences) - 1 for s in SAMPLES]
    terms = [np.log1p(np.exp(x[b, i])) - x[b, i] * (i == end) for b, end in enumerate(last) for i in range(end + 1)]
    np.testing.assert_allclose(total / rows, np.mean(terms), rtol=1e-5)
    grad = jax.grad(lambda p: loss(p, batch, None, frozen=params)[0])(trained)
    moved = {name for name in grad if any(np.any(np.asarray(x)) for x in jax.tree.leaves(grad[name]))}
    assert moved == {"stop"}


def test_the_loss_after_thoughts_counts_what_follows_the_question(batch, params):
    def states_after(params, question, question_segments, tokens, segments):
        # Without thoughts: the states of the whole text, from the question's newline on.
        hidden = apply(params, batch["text/tokens"], positions=None, segments=batch["text/segments"], key=None)
        place = jnp.minimum(batch["ends"][:, :1] + jnp.arange(tokens.shape[1]), hidden.shape[1] - 1)
        return jnp.take_along_axis(hidden, place[..., None], axis=1)

    room = int(batch["step_segments"].sum(axis=(1, 2)).max())
    found = jax.jit(make_thoughts_loss(states_after, HEAD, room=room, mesh=None))(params, batch, None)
    expected = jax.jit(make_answer_loss(make_hidden_nll(apply, HEAD)))(params, batch, None)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[1] == expected[1]


@pytest.mark.parametrize("weights", [{}, {"nll": 1.0, "kl": 1.0}])
def test_unknown_terms_are_refused(weights):
    with pytest.raises(ValueError, match="expected nll, info_nce, tie, mse"):
        make_latent_loss(predict, STATES, STATS, weights=weights)
