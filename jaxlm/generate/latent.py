"""Inference in the space of sentences: vectors to sentences, and the latent model rolled forward.

Every function is jitted whole, with caches: a batch of questions is prefilled once, and each further vector costs one
step of the latent model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.generate.engine import next_token_logits
from jaxlm.models import decoder, latent, thoughts
from jaxlm.models.cache import KVCache, init_cache
from jaxlm.models.config import DecoderConfig
from jaxlm.models.latent import LatentConfig
from jaxlm.typing import Array, Bool, Float, Int, Params


class Sentences(NamedTuple):
    """Tokens with their end token, padded by 0; segments: 1 for a token, 0 for padding."""

    tokens: Int[Array, "N S"]
    segments: Int[Array, "N S"]


def write(
    params: Params, vectors: Float[Array, "N D"], *, cfg: DecoderConfig, end_id: int | None, max_tokens: int,
    cache: KVCache | None = None,
) -> Sentences:  # fmt: skip
    """The sentences that a decoder writes from vectors, greedily; each ends with end_id, or after max_tokens.

    end_id: None writes on. cache: what stands before the vectors, with room for max_tokens more.
    """

    def step(carry: tuple[KVCache, Array, Array], _: None) -> tuple[tuple[KVCache, Array, Array], tuple[Array, Array]]:
        cache, embedding, active = carry
        out = decoder.forward(params, None, embeddings=embedding[:, None], cfg=cfg, cache=cache)
        token = jnp.argmax(next_token_logits(params, out.hidden[:, 0], cfg=cfg), axis=-1).astype(jnp.int32)
        following = decoder.embed_tokens(params, token[:, None], cfg=cfg)[:, 0]
        assert out.cache is not None
        going = active if end_id is None else active & (token != end_id)
        return (out.cache, following, going), (jnp.where(active, token, 0), active)

    before = init_cache(cfg, vectors.shape[0], max_tokens) if cache is None else cache
    start = before, vectors.astype(cfg.dtype), jnp.ones(vectors.shape[:1], bool)
    _, (tokens, active) = jax.lax.scan(step, start, None, length=max_tokens)
    return Sentences(tokens.T, active.T.astype(jnp.int32))


class Text(NamedTuple):
    """A growing text for each row: tokens [B, T], and how many of them there are."""

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]

    @property
    def segments(self) -> Int[Array, "B T"]:
        """1 for a token, 0 for what is not written yet."""
        return (jnp.arange(self.tokens.shape[1]) < self.length[:, None]).astype(jnp.int32)

    def plus(self, new: Sentences) -> Text:
        """With a sentence behind each row; what does not fit is dropped."""
        place = self.length[:, None] + jnp.arange(new.tokens.shape[1])
        place = jnp.where(new.segments != 0, place, self.tokens.shape[1])
        tokens = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(self.tokens, place, new.tokens)
        return Text(tokens, jnp.minimum(self.length + new.segments.sum(axis=1), self.tokens.shape[1]))


def start_text(question: Int[Array, "B Q"], segments: Int[Array, "B Q"], *, room: int) -> Text:
    """The questions as texts with room for that many tokens behind."""
    return Text(jnp.pad(question, ((0, 0), (0, room))), jnp.sum(segments != 0, axis=1, dtype=jnp.int32))


class Roll(NamedTuple):
    """What came of a roll of at most R sentences. outputs: of the latent model (None where there is none), 0 after the
    last. number: of sentences in each row, the others have no tokens."""

    sentences: Sentences
    outputs: Float[Array, "B R Z"] | None
    number: Int[Array, "B"]


Stop = Callable[[Params, Float[Array, "B Z"], Float[Array, "B Z"]], Bool[Array, "B"]]
"""(parameters of the latent model, an output, the one before it, 0 at first) -> whether the reasoning ends with it."""


def never(params: Params, output: Array, previous: Array) -> Array:
    """All sentences are rolled: the rule of the published accuracies, which read the first one that is an answer."""
    return jnp.zeros(output.shape[:1], bool)


def by_classifier(params: Params, output: Array, previous: Array) -> Array:
    """Where the trained classifier finds an end more likely than not (arXiv:2505.22202, appendix D)."""
    return latent.stop_logits(params, output[:, None])[:, 0] > 0


def by_cosine(threshold: float) -> Stop:
    """Where an output points where the one before it did, cos > threshold: nothing new is said (a rule of the large
    concept model, arXiv:2412.08821)."""

    def stop(params: Params, output: Array, previous: Array) -> Array:
        a, b = output.astype(jnp.float32), previous.astype(jnp.float32)
        return jnp.sum(a * b, axis=-1) > threshold * jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)

    return stop


@partial(jax.jit, static_argnames=("cfg", "num_sentences", "end_id", "max_tokens"))
def roll_encoder(
    params: Params, question: Int[Array, "B Q"], segments: Int[Array, "B Q"], *, cfg: DecoderConfig,
    num_sentences: int, end_id: int, max_tokens: int,
) -> Roll:  # fmt: skip
    """The contextual encoder and decoder alone: each sentence is written from the vector of all before it."""

    def step(text: Text, _: None) -> tuple[Text, Sentences]:
        vectors = latent.encode_sentences(params, text.tokens, text.segments, cfg=cfg)
        new = write(params, vectors, cfg=cfg, end_id=end_id, max_tokens=max_tokens)
        return text.plus(new), new

    text = start_text(question, segments, room=num_sentences * max_tokens)
    _, found = jax.lax.scan(step, text, None, length=num_sentences)
    return Roll(_by_row(found), None, _all(question, num_sentences))


@partial(jax.jit, static_argnames=("cfg", "decoder_cfg", "num_sentences", "end_id", "max_tokens", "stop"))
def roll_continuous(
    params: Params, decoder_params: Params, question: Int[Array, "B Q"], segments: Int[Array, "B Q"], *,
    cfg: LatentConfig, decoder_cfg: DecoderConfig, num_sentences: int, end_id: int, max_tokens: int, stop: Stop = never,
) -> Roll:  # fmt: skip
    """Continuous inference: each output is the next input as it is, and text is written at the end alone.

    num_sentences: at most. stop: ends a row; the roll itself ends as soon as every row has.
    """
    outputs, number = _roll(params, question, segments, cfg=cfg, num_sentences=num_sentences, stop=stop)
    vectors = latent.map_vectors(params["out"], outputs)
    flat = vectors.reshape(-1, vectors.shape[-1])
    found = write(decoder_params, flat, cfg=decoder_cfg, end_id=end_id, max_tokens=max_tokens)
    by_row = jax.tree.map(lambda x: x.reshape(*outputs.shape[:2], -1), found)
    there = (jnp.arange(num_sentences) < number[:, None])[..., None]
    return Roll(jax.tree.map(lambda x: jnp.where(there, x, 0), by_row), outputs, number)


def _roll(
    params: Params, question: Array, segments: Array, *, cfg: LatentConfig, num_sentences: int, stop: Stop
) -> tuple[Float[Array, "B R Z"], Int[Array, "B"]]:
    """The outputs until the rule ends a row, each fed back as it is, and how many there are."""

    class Carry(NamedTuple):
        i: Array
        cache: KVCache
        output: Array
        outputs: Array
        number: Array
        going: Array

    def step(at: Carry) -> Carry:
        previous = jnp.where(at.i > 0, at.outputs[:, at.i - 1], 0)
        outputs = at.outputs.at[:, at.i].set(jnp.where(at.going[:, None], at.output, 0))
        going = at.going & ~stop(params, at.output, previous)
        cache, output = _advance(params, at.output, at.cache, cfg=cfg)
        return Carry(at.i + 1, cache, output, outputs, at.number + at.going, going)

    cache, output = _prefill(params, question, segments, cfg=cfg, room=num_sentences)
    rows = question.shape[0]
    start = Carry(
        jnp.int32(0), cache, output, jnp.zeros((rows, num_sentences, output.shape[-1]), output.dtype),
        jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool),
    )  # fmt: skip
    end = jax.lax.while_loop(lambda at: (at.i < num_sentences) & jnp.any(at.going), step, start)
    return end.outputs, end.number


Reencode = Callable[[Text, Sentences], Float[Array, "B E"]]
"""(text before a sentence, the sentence) -> its vector: of the sentence, or of what stands before it."""


def roll_discretized(
    params: Params, decoder_params: Params, question: Int[Array, "B Q"], segments: Int[Array, "B Q"], *,
    cfg: LatentConfig, decoder_cfg: DecoderConfig, reencode: Reencode, num_sentences: int, end_id: int,
    max_tokens: int,
) -> Roll:  # fmt: skip
    """Discretized inference: each output is written as text, and the vector of that text is the next input.

    To be called under jit, with `reencode` closed over its parameters there.
    """
    cache, output = _prefill(params, question, segments, cfg=cfg, room=num_sentences)

    def step(carry: tuple[KVCache, Array, Text], _: None) -> Any:
        cache, output, text = carry
        vectors = latent.map_vectors(params["out"], output[:, None])[:, 0]
        new = write(decoder_params, vectors, cfg=decoder_cfg, end_id=end_id, max_tokens=max_tokens)
        read = latent.into(params, reencode(text, new)[:, None], cfg=cfg)[:, 0]
        return (*_advance(params, read, cache, cfg=cfg), text.plus(new)), (new, output)

    text = start_text(question, segments, room=num_sentences * max_tokens)
    _, (found, outputs) = jax.lax.scan(step, (cache, output, text), None, length=num_sentences)
    return Roll(_by_row(found), outputs.swapaxes(0, 1), _all(question, num_sentences))


@partial(jax.jit, static_argnames=("cfg", "number", "end_id", "max_tokens"))
def roll_thoughts(
    params: Params, question: Int[Array, "B Q"], segments: Int[Array, "B Q"], *, cfg: DecoderConfig, number: int,
    end_id: int, max_tokens: int,
) -> Sentences:  # fmt: skip
    """What is written after the questions and that many thoughts (`jaxlm.models.thoughts`), token by token."""
    cache = thoughts.think(params, question, segments, cfg=cfg, number=number, room=max_tokens)
    newline = jnp.full((question.shape[0], 1), end_id)
    read = decoder.embed_tokens(params["model"], newline, cfg=cfg)[:, 0]
    return write(params["model"], read, cfg=cfg, end_id=None, max_tokens=max_tokens, cache=cache)


def _prefill(
    params: Params, question: Array, segments: Array, *, cfg: LatentConfig, room: int
) -> tuple[KVCache, Float[Array, "B Z"]]:
    """The cache after the questions, and the output at the last token of each."""
    cache = init_cache(cfg.model, question.shape[0], question.shape[1] + room)
    out = decoder.forward(params["model"], question, cfg=cfg.model, segments=segments, cache=cache)
    assert out.cache is not None
    last = jnp.sum(segments != 0, axis=1) - 1
    return out.cache, jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]


def _advance(params: Params, vector: Array, cache: KVCache, *, cfg: LatentConfig) -> tuple[KVCache, Array]:
    out = decoder.forward(params["model"], None, embeddings=vector[:, None], cfg=cfg.model, cache=cache)
    assert out.cache is not None
    return out.cache, out.hidden[:, 0]


def _all(question: Array, num_sentences: int) -> Array:
    return jnp.full(question.shape[0], num_sentences, jnp.int32)


def _by_row(found: Sentences) -> Sentences:
    """[R, B, S] of a scan as [B, R, S]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), found)
