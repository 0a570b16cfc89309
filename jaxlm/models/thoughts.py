"""Continuous thoughts: a decoder that, between a question and its answer, reads its own last states in place of tokens.

    q_1 ... q_n   z_1 ... z_k   \\n   answer ...            z_1: the state at q_n,   z_{i+1}: the state at z_i

Sources: Hao et al. 2024, arXiv:2412.06769 (Coconut); for the control that reads one learnt vector k times instead,
Goyal et al. 2023, arXiv:2310.02226 (pause tokens). The newline after the thoughts stands for Coconut's <eot>, that of
the question for its <bot>. Every row has as many thoughts, so shapes are static and a batch is one prefill and k steps,
not k + 1 passes over all that stands before.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.models import decoder
from jaxlm.models.cache import KVCache, init_cache
from jaxlm.models.config import DecoderConfig
from jaxlm.models.decoder import identity
from jaxlm.models.spec import Param, Spec, normal
from jaxlm.typing import Array, Constrain, Float, Int, Params


def spec(cfg: DecoderConfig, *, pause: bool = False) -> Spec:
    """The parameters: the decoder's, and the vector that is read in the place of thoughts, if it is to be learnt."""
    vector = {"pause": Param((cfg.width,), (None,), normal(0.02), decay=False)} if pause else {}
    return {"model": decoder.spec(cfg)} | vector


def think(
    params: Params, question: Int[Array, "B Q"], segments: Int[Array, "B Q"], *, cfg: DecoderConfig, number: int,
    room: int, constrain: Constrain = identity,
) -> KVCache:  # fmt: skip
    """The cache after the questions and `number` thoughts, with room for that many tokens behind."""
    cache = init_cache(cfg, question.shape[0], question.shape[1] + number + room)
    read = decoder.forward(params["model"], question, cfg=cfg, segments=segments, cache=cache, constrain=constrain)
    assert read.cache is not None
    if "pause" in params:  # nothing is fed back, so one pass reads them all
        pauses = jnp.broadcast_to(params["pause"], (question.shape[0], number, cfg.width))
        return _read(params, pauses, read.cache, cfg=cfg, constrain=constrain)[0]

    def step(carry: tuple[KVCache, Array], _: None) -> tuple[tuple[KVCache, Array], None]:
        cache, thought = carry
        return _read(params, thought, cache, cfg=cfg, constrain=constrain), None

    last = jnp.sum(segments != 0, axis=1) - 1
    first = jnp.take_along_axis(read.hidden, last[:, None, None], axis=1)
    (cache, _), _ = jax.lax.scan(step, (read.cache, first), None, length=number)
    return cache


def _read(
    params: Params, vectors: Float[Array, "B K D"], cache: KVCache, *, cfg: DecoderConfig, constrain: Constrain
) -> tuple[KVCache, Float[Array, "B K D"]]:
    vectors = vectors.astype(cfg.dtype)
    out = decoder.forward(params["model"], None, embeddings=vectors, cfg=cfg, cache=cache, constrain=constrain)
    assert out.cache is not None
    return out.cache, out.hidden


def states_after(
    params: Params, question: Int[Array, "B Q"], question_segments: Int[Array, "B Q"], tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"], *, cfg: DecoderConfig, number: int, constrain: Constrain = identity,
) -> Float[Array, "B T D"]:  # fmt: skip
    """States at tokens that follow the thoughts, the newline first: state t predicts token t + 1."""
    cache = think(
        params, question, question_segments, cfg=cfg, number=number, room=tokens.shape[1], constrain=constrain
    )
    return decoder.forward(
        params["model"], tokens, cfg=cfg, segments=segments, cache=cache, constrain=constrain
    ).hidden
