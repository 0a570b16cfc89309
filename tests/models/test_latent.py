"""The latent model and its rolls: one pass gives what a pass per prefix gives, caches what full passes give."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate import latent as rolls
from jaxlm.models import decoder, latent
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig

V, S, M, END = 40, 4, 3, 7
TEXT = DecoderConfig(
    vocab_size=V, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, max_length=64
)
CFG = latent.LatentConfig(
    dataclasses.replace(TEXT, width=24, num_heads=3, num_layers=1), encoder_width=16, decoder_width=16, dropout=0.3
)
LENGTHS = (6, 3)


def params_of(spec, seed):
    params = specs.init(jax.random.key(seed), spec)
    # Larger than usual, so that a wrong place shows.
    return jax.tree.map(lambda x: x if x.ndim < 2 else 6 * x, params)


@pytest.fixture(scope="module")
def text_params():
    return params_of(decoder.spec(TEXT), 0)


@pytest.fixture(scope="module")
def params():
    return params_of(latent.spec(CFG), 1)


@pytest.fixture(scope="module")
def question():
    rng = np.random.default_rng(0)
    segments = (np.arange(8) < np.array(LENGTHS)[:, None]).astype(np.int32)
    return rng.integers(8, V, (2, 8)) * segments, segments


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def test_one_causal_pass_gives_the_vectors_of_every_prefix(text_params, question):
    tokens, segments = question
    ends = np.array([[2, 5], [0, 2]])
    found = latent.encode_prefixes(text_params, tokens, segments, ends, cfg=TEXT)
    for b in range(2):
        for i, end in enumerate(ends[b]):
            alone = latent.encode_sentences(
                text_params, tokens[b : b + 1, : end + 1], np.ones((1, end + 1), np.int32), cfg=TEXT
            )
            close(found[b, i], alone[0])


def test_a_sentence_of_padding_has_the_vector_0(text_params):
    vectors = latent.encode_sentences(text_params, np.full((1, 3), 9), np.zeros((1, 3), np.int32), cfg=TEXT)
    assert np.all(np.asarray(vectors) == 0)


def test_the_decoder_reads_the_vector_and_the_words_before(text_params):
    rng = np.random.default_rng(1)
    vectors, tokens = rng.normal(size=(2, 16)).astype(np.float32), rng.integers(8, V, (2, S))
    found = latent.decoder_states(text_params, vectors, tokens, np.ones_like(tokens), cfg=TEXT)
    words = decoder.embed_tokens(text_params, tokens, cfg=TEXT)
    for t in range(S):
        read = jnp.concatenate([vectors[:, None], words[:, :t]], axis=1)
        close(found[:, t], decoder.forward(text_params, None, embeddings=read, cfg=TEXT).hidden[:, -1])


def test_one_pass_predicts_what_a_pass_per_sentence_does(params, question):
    tokens, segments = question
    vectors = np.random.default_rng(2).normal(size=(2, M, 16)).astype(np.float32)
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    found = latent.predict(params, tokens, segments, vectors, mask, cfg=CFG)
    words = decoder.embed_tokens(params["model"], tokens, cfg=CFG.model)
    mapped = latent.map_vectors(params["into"], vectors)
    for b, length in enumerate(LENGTHS):
        for i in range(int(mask[b].sum())):
            read = jnp.concatenate([words[b, :length], mapped[b, :i]])[None]
            alone = decoder.forward(params["model"], None, embeddings=read, cfg=CFG.model).hidden[:, -1]
            close(found.output[b, i], alone[0])
            close(found.sentence[b, i], latent.map_vectors(params["out"], alone[None])[0, 0])
    close(found.target, mapped)


def test_dropout_is_of_rows_and_padding_changes_nothing(params, question):
    tokens, segments = question
    vectors, mask = np.random.default_rng(3).normal(size=(2, M, 16)).astype(np.float32), np.ones((2, M), bool)
    keys = jax.random.split(jax.random.key(5), 2)
    one = latent.predict(params, tokens, segments, vectors, mask, cfg=CFG, key=keys)
    wide = [np.pad(x, ((0, 0), (0, 4))) for x in (tokens, segments)]
    two = latent.predict(params, *wide, vectors, mask, cfg=CFG, key=keys)
    last = latent.predict(params, tokens[1:], segments[1:], vectors[1:], mask[1:], cfg=CFG, key=keys[1:])
    for a, b, c in zip(one, two, last):
        close(a, b)
        close(a[1:], c)
    plain = latent.predict(params, tokens, segments, vectors, mask, cfg=CFG)
    assert not np.allclose(one.target, plain.target)
    kept = np.asarray(one.target) != 0
    close(np.asarray(one.target)[kept], np.asarray(plain.target)[kept] / 0.7)


def test_unit_scale_is_a_layer_norm_without_parameters(params):
    cfg = dataclasses.replace(CFG, unit_scale=True)
    x = np.asarray(latent.into(params, np.random.default_rng(4).normal(size=(2, M, 16)).astype(np.float32), cfg=cfg))
    close(x.mean(-1), np.zeros((2, M)), 1e-4)
    close(x.std(-1), np.ones((2, M)), 1e-2)


def greedy(text_params, vector):
    """Without a cache, one token after the other."""
    words: list[int] = []
    while len(words) < S and words[-1:] != [END]:
        embedded = (
            decoder.embed_tokens(text_params, np.array([words], int), cfg=TEXT) if words else np.zeros((1, 0, 16))
        )
        read = jnp.concatenate([vector[None, None], embedded], axis=1)
        hidden = decoder.forward(text_params, None, embeddings=read, cfg=TEXT).hidden[0, -1]
        words.append(int(jnp.argmax(hidden @ decoder.head(text_params, cfg=TEXT)["unembed"].T)))
    return words


def listed(found, *where):
    return np.asarray(found.tokens)[where][np.asarray(found.segments)[where] == 1].tolist()


def test_writing_with_a_cache_is_greedy_decoding(text_params):
    vectors = 3 * np.random.default_rng(5).normal(size=(3, 16)).astype(np.float32)
    end = greedy(text_params, vectors[0])[1]  # so that a sentence does end before its last place
    found = rolls.write(text_params, vectors, cfg=TEXT, end_id=end, max_tokens=S)
    for i, vector in enumerate(vectors):
        expected = [*greedy(text_params, vector)]
        cut = expected.index(end) + 1 if end in expected else S
        if END not in expected[:cut]:  # `greedy` ends there
            assert listed(found, i) == expected[:cut]
    assert int(found.segments[0].sum()) == 2


def test_the_continuous_roll_feeds_back_its_outputs(params, text_params, question):
    tokens, segments = question
    found = rolls.roll_continuous(
        params, text_params, tokens, segments, cfg=CFG, decoder_cfg=TEXT, num_sentences=2, end_id=END, max_tokens=S
    )
    for b, length in enumerate(LENGTHS):
        read = decoder.embed_tokens(params["model"], tokens[b : b + 1, :length], cfg=CFG.model)
        for i in range(2):
            output = decoder.forward(params["model"], None, embeddings=read, cfg=CFG.model).hidden[:, -1]
            close(found.outputs[b, i], output[0], 1e-4)
            assert listed(found.sentences, b, i) == greedy(
                text_params, latent.map_vectors(params["out"], output[:, None])[0, 0]
            )
            read = jnp.concatenate([read, output[:, None]], axis=1)


def ends_at(second, first):
    """A rule that ends rows after given numbers of outputs, told by the outputs of a roll without one."""

    def stop(params, output, previous):
        return jnp.all(output == jnp.stack([first, second]), axis=-1)

    return stop


@pytest.mark.parametrize("rule", [pytest.param("places", marks=pytest.mark.slow), "classifier", "cosine"])
def test_a_rule_ends_a_row_and_leaves_the_others(params, text_params, question, rule):
    run = lambda stop: rolls.roll_continuous(  # noqa: E731
        params, text_params, *question, cfg=CFG, decoder_cfg=TEXT, num_sentences=4, end_id=END, max_tokens=S, stop=stop
    )
    whole = run(rolls.never)
    assert whole.number.tolist() == [4, 4]
    outputs = np.asarray(whole.outputs)
    if rule == "places":
        found, expected = run(ends_at(whole.outputs[1, 2], whole.outputs[0, 1])), [2, 3]
    elif rule == "classifier":
        found = run(rolls.by_classifier)
        expected = [first_of(row > 0) for row in np.asarray(latent.stop_logits(params, whole.outputs))]
    else:
        norms = np.linalg.norm(outputs, axis=-1)
        cosines = (outputs[:, 1:] * outputs[:, :-1]).sum(-1) / (norms[:, 1:] * norms[:, :-1])
        threshold = float(np.sort(cosines.ravel())[-2]) - 1e-4  # so that two places pass
        found = run(rolls.by_cosine(threshold))
        expected = [first_of(np.append(False, row > threshold)) for row in cosines]
    assert found.number.tolist() == expected
    for b, number in enumerate(expected):
        np.testing.assert_array_equal(found.outputs[b, :number], outputs[b, :number])
        assert not np.any(found.outputs[b, number:]) and not np.any(found.sentences.segments[b, number:])
        np.testing.assert_array_equal(found.sentences.tokens[b, :number], whole.sentences.tokens[b, :number])


def first_of(holds):
    return int(np.argmax(holds)) + 1 if holds.any() else len(holds)


@pytest.mark.parametrize("kind", ["semantic", pytest.param("contextual", marks=pytest.mark.slow)])
def test_the_discretized_roll_reads_what_it_wrote(params, text_params, question, kind):
    tokens, segments = question

    def reencode(text, new):
        read = text if kind == "contextual" else new
        return latent.encode_sentences(text_params, read.tokens, read.segments, cfg=TEXT)

    found = jax.jit(
        lambda: rolls.roll_discretized(
            params, text_params, tokens, segments, cfg=CFG, decoder_cfg=TEXT, reencode=reencode, num_sentences=2,
            end_id=END, max_tokens=S,
        )
    )()  # fmt: skip
    for b, length in enumerate(LENGTHS):
        text = tokens[b, :length].tolist()
        read = decoder.embed_tokens(params["model"], tokens[b : b + 1, :length], cfg=CFG.model)
        for i in range(2):
            output = decoder.forward(params["model"], None, embeddings=read, cfg=CFG.model).hidden[:, -1]
            new = greedy(text_params, latent.map_vectors(params["out"], output[:, None])[0, 0])
            assert listed(found.sentences, b, i) == new
            source = np.array([new if kind == "semantic" else text])
            vector = latent.encode_sentences(text_params, source, np.ones_like(source), cfg=TEXT)
            text += new
            read = jnp.concatenate([read, latent.into(params, vector[:, None], cfg=CFG)], axis=1)


@pytest.mark.slow
def test_the_encoder_and_decoder_alone_roll_over_their_own_text(text_params, question):
    tokens, segments = question
    found = rolls.roll_encoder(text_params, tokens, segments, cfg=TEXT, num_sentences=2, end_id=END, max_tokens=S)
    for b, length in enumerate(LENGTHS):
        text = tokens[b, :length].tolist()
        for i in range(2):
            source = np.array([text])
            new = greedy(text_params, latent.encode_sentences(text_params, source, np.ones_like(source), cfg=TEXT)[0])
            assert listed(found.sentences, b, i) == new
            text += new


def test_settings_that_cannot_be_meant():
    with pytest.raises(ValueError, match="widths must be at least 1"):
        dataclasses.replace(CFG, encoder_width=0)
    with pytest.raises(ValueError, match="dropout must be in"):
        dataclasses.replace(CFG, dropout=1.0)
