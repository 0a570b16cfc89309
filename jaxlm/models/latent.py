"""Sentences as vectors: a decoder that reads and writes them, and a model that predicts the vector of the next one.

Three networks, each a decoder of `jaxlm.models.decoder`: the encoder turns a sentence, or all that stands before it,
into the state of its last token; the decoder writes a sentence after one vector in the place of a token; the latent
model reads the tokens of a question and then vectors, and its output at each place is the vector of what follows:

    input     q_1 ... q_n   P1(h_1)   P1(h_2)   ...          output there     o_1 (at q_n)   o_2 (at h_1)   ...
    decoded   s_i from P2(o_i)

Source: Hwang et al. 2025, arXiv:2505.22202, section 3. The encoder's vectors h_i are those of the sentences (semantic)
or of what stands before each (contextual).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models import decoder, layers, pooling
from jaxlm.models.block import linear_spec
from jaxlm.models.config import DecoderConfig
from jaxlm.models.decoder import identity
from jaxlm.models.spec import Spec
from jaxlm.typing import Array, Bool, Constrain, Float, Int, Key, Params

# Streams of the mappers' dropout, outside those of the layers.
_INTO, _OUT = 1 << 20, (1 << 20) + 1


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """model: the latent network. encoder_width, decoder_width: of the vectors that it reads, and of those that the
    sentence decoder does. dropout: after the mapper into the network, and before the one out of it. unit_scale: vectors
    that enter have mean 0 and variance 1 over their entries, as the outputs have under a layer norm; ours, not the
    paper's: what is fed back then has the scale of what was trained on.
    """

    model: DecoderConfig
    encoder_width: int
    decoder_width: int
    dropout: float = 0.2
    unit_scale: bool = False

    def __post_init__(self) -> None:
        if min(self.encoder_width, self.decoder_width) < 1:
            raise ValueError(f"widths must be at least 1, found {self.encoder_width} and {self.decoder_width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout}")


def spec(cfg: LatentConfig) -> Spec:
    """The parameters: the network, the mapper of vectors into it, that of its outputs to the decoder, and the
    classifier of outputs after which it stops."""
    width = cfg.model.width
    return {
        "model": decoder.spec(cfg.model),
        "into": mapper_spec(cfg.encoder_width, width),
        "out": mapper_spec(width, cfg.decoder_width),
        "stop": stop_spec(width),
    }


def mapper_spec(width_in: int, width_out: int) -> Spec:
    """Linear, GELU, Linear; the hidden width is the mean of the two."""
    hidden = (width_in + width_out) // 2
    return {
        "up": linear_spec((width_in, hidden), ("embed", "mlp"), bias_dims=1),
        "down": linear_spec((hidden, width_out), ("mlp", "embed"), bias_dims=1),
    }


def map_vectors(params: Params, x: Float[Array, "B M E"]) -> Float[Array, "B M Z"]:
    """The mapper's two layers."""
    return layers.project(params["down"], jax.nn.gelu(layers.project(params["up"], x), approximate=False))


def stop_spec(width: int) -> Spec:
    """Linear layers of widths D/4, D/16 and 1: 768, 192, 48, 1 in the paper (appendix D)."""
    widths = (width, max(1, width // 4), max(1, width // 16), 1)
    return {
        f"linear{i}": linear_spec(shape, (None, None), bias_dims=1)
        for i, shape in enumerate(itertools.pairwise(widths))
    }


def stop_logits(params: Params, outputs: Float[Array, "B M Z"]) -> Float[Array, "B M"]:
    """The classifier's logits: positive where the reasoning ends with this output (GELU between its layers)."""
    stop = params["stop"]
    for i in range(len(stop) - 1):
        outputs = jax.nn.gelu(layers.project(stop[f"linear{i}"], outputs), approximate=False)
    return layers.project(stop[f"linear{len(stop) - 1}"], outputs)[..., 0]


def encode_sentences(
    params: Params,
    tokens: Int[Array, "N S"],
    segments: Int[Array, "N S"],
    *,
    cfg: DecoderConfig,
    constrain: Constrain = identity,
) -> Float[Array, "N D"]:
    """Semantic vectors: the state of each sentence's last token. 0 for a row of padding."""
    hidden = decoder.forward(params, tokens, cfg=cfg, segments=segments, constrain=constrain).hidden
    return pooling.last(hidden, segments != 0)


def encode_prefixes(
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    ends: Int[Array, "B P"],
    *,
    cfg: DecoderConfig,
    constrain: Constrain = identity,
) -> Float[Array, "B P D"]:
    """Contextual vectors: the states at the ends of sentences, each of all that stands before. One causal pass.

    ends: [B, P] places in the row. The vector at the end of the question is that of the first sentence.
    """
    hidden = decoder.forward(params, tokens, cfg=cfg, segments=segments, constrain=constrain).hidden
    return jnp.take_along_axis(hidden, ends[:, :, None], axis=1)


def decoder_states(
    params: Params,
    vectors: Float[Array, "N D"],
    tokens: Int[Array, "N S"],
    segments: Int[Array, "N S"],
    *,
    cfg: DecoderConfig,
    constrain: Constrain = identity,
) -> Float[Array, "N S D"]:
    """States of the decoder that reads a vector and then the sentence: state t predicts token t.

    tokens, segments: the sentence, 0 for padding at its end. The last token is never read.
    """
    words = decoder.embed_tokens(params, tokens[:, :-1], cfg=cfg, constrain=constrain)
    read = jnp.concatenate([vectors[:, None].astype(words.dtype), words], axis=1)
    return decoder.forward(params, None, embeddings=read, cfg=cfg, segments=segments, constrain=constrain).hidden


class Predicted(NamedTuple):
    """output: o_i, what the latent model says of sentence i, after its final norm. target: P1(h_i), the vector of
    sentence i as the model reads it, which `latent_info_nce` compares with. sentence: P2(o_i), for the decoder.
    stop_logit: of the classifier, to which gradients come and not beyond."""

    output: Float[Array, "B M Z"]
    target: Float[Array, "B M Z"]
    sentence: Float[Array, "B M D"]
    stop_logit: Float[Array, "B M"]


def predict(
    params: Params,
    question: Int[Array, "B Q"],
    segments: Int[Array, "B Q"],
    vectors: Float[Array, "B M E"],
    mask: Bool[Array, "B M"],
    *,
    cfg: LatentConfig,
    key: Key[Array, "..."] | None = None,
    constrain: Constrain = identity,
) -> Predicted:
    """The vectors of all sentences of a sample, each from the question and the sentences before it. One causal pass.

    question, segments: right-padded, 0 segments are padding. vectors: [B, M, E], h_i of the encoder. mask: [B, M], the
    sentences that there are, first ones first. key: dropout, one key or one for each row; None switches it off.
    Positions go on from each question's own length, so padding changes nothing.
    """
    keys = decoder.row_keys(key, question.shape[0])
    words = decoder.embed_tokens(params["model"], question, cfg=cfg.model, constrain=constrain)
    target = layers.dropout(into(params, vectors, cfg=cfg), cfg.dropout, keys, _INTO)
    parts = jnp.concatenate([segments, mask.astype(segments.dtype)], axis=1)
    hidden = decoder.forward(
        params["model"],
        None,
        embeddings=jnp.concatenate([words, target.astype(words.dtype)], axis=1),
        cfg=cfg.model,
        positions=jnp.maximum(jnp.cumsum(parts != 0, axis=1) - 1, 0),
        segments=parts,
        key=keys,
        constrain=constrain,
    ).hidden
    first = pooling.last(hidden[:, : question.shape[1]], segments != 0).astype(hidden.dtype)
    output = jnp.concatenate([first[:, None], hidden[:, question.shape[1] : -1]], axis=1)
    sentence = map_vectors(params["out"], layers.dropout(output, cfg.dropout, keys, _OUT))
    return Predicted(output, target, sentence, stop_logits(params, jax.lax.stop_gradient(output)))


def into(params: Params, vectors: Float[Array, "B M E"], *, cfg: LatentConfig) -> Float[Array, "B M Z"]:
    """Vectors of the encoder as the latent model reads them."""
    x = map_vectors(params["into"], vectors.astype(cfg.model.dtype))
    if not cfg.unit_scale:
        return x
    return layers.layer_norm(x, jnp.ones(x.shape[-1]), None, eps=cfg.model.norm_eps)
