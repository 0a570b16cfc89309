"""Losses of the stages that teach a model to predict vectors of sentences; models arrive as functions.

A batch is that of `jaxlm.data.reasoning.make_sample_rows`. The vectors of its sentences come from a `Vectors`, semantic
or contextual, while these are learnt; those of a frozen encoder never change and are data, a field of the batch
computed once. `states` is the sentence decoder (`jaxlm.models.latent.decoder_states`), `stats` its head
(`jaxlm.train.objectives.make_head_stats`), whose log-probabilities `jaxlm.losses.next_sentence_nll` sums. A batch is
one micro-batch: the terms are means over different things, and the negatives are the whole batch.

Source: Hwang et al. 2025, arXiv:2505.22202, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.losses import latent_info_nce, latent_squared_error, termination
from jaxlm.ops.masked import masked_mean
from jaxlm.train.objectives import Head, HeadStats, Nll, make_hidden_nll, make_next_token_loss
from jaxlm.typing import Array, Batch, Bool, Float, LossFn, Metrics, Params

TERMS = ("nll", "info_nce", "tie", "mse", "stop")
"""Of the loss of a latent model."""

Vectors = Callable[[Params, Batch], Float[Array, "B M E"]]
"""(parameters of the encoder, batch) -> the vector of every sentence."""

States = Callable[[Params, Float[Array, "N D"], Array, Array], Float[Array, "N S D"]]
"""(parameters of the decoder, vectors, tokens, segments) -> states that predict the tokens."""


def sentences(batch: Batch) -> Bool[Array, "B M"]:
    """Which sentences there are."""
    return batch["step_segments"][..., 0] != 0


def make_answer_loss(nll: Nll) -> LossFn:
    """Next-token prediction of what follows the question, token by token: the fine-tuning of the first stage.

    nll: of a language model, `jaxlm.train.objectives.make_hidden_nll`. The loss is its `make_next_token_loss`.
    """
    loss = make_next_token_loss(nll)

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        tokens, segments = batch["text/tokens"], batch["text/segments"]
        behind = jnp.arange(1, tokens.shape[1]) > batch["ends"][:, :1]
        shifted = {"inputs": tokens[:, :-1], "segments": segments[:, :-1], "targets": tokens[:, 1:]}
        return loss(params, {**shifted, "mask": behind & (segments[:, 1:] != 0)}, key)

    return loss_fn


def make_thoughts_loss(states_after: Callable[..., Array], head: Head, *, room: int, mesh: Mesh | None) -> LossFn:
    """Next-token prediction of what follows a question and its thoughts (Coconut and its control).

    states_after: (params, question, its segments, tokens, segments) -> states (`jaxlm.models.thoughts.states_after`).
    room: tokens that follow a question, at most; ends of sentences count.
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        def apply(params: Params, tokens: Array, *, segments: Array, **_: Any) -> Array:
            return states_after(params, batch["question/tokens"], batch["question/segments"], tokens, segments)

        place = batch["ends"][:, :1] + jnp.arange(room + 1)  # from the newline of the question, which is read again
        inside = place < batch["text/tokens"].shape[1]
        place = jnp.where(inside, place, 0)
        tokens, segments = (jnp.take_along_axis(batch[f"text/{x}"], place, axis=1) for x in ("tokens", "segments"))
        there = inside & (segments != 0)
        shifted = {"inputs": tokens[:, :-1], "segments": there[:, :-1].astype(jnp.int32), "targets": tokens[:, 1:]}
        nll = make_hidden_nll(apply, head, mesh=mesh)
        return make_next_token_loss(nll)(params, {**shifted, "mask": there[:, 1:]}, key)

    return loss_fn


def make_sentence_loss(
    vectors: Vectors,
    states: States,
    stats: HeadStats,
    *,
    drop: Callable[[Array, Array | None], Array] | None = None,
    contrast_weight: float | None = None,
    temperature: float = 0.1,
    capacity: int | None = None,
) -> LossFn:
    """Writing every sentence from its vector, with one network as encoder and decoder.

        mean over tokens of -log p(y_t | y_<t, vector)  +  contrast_weight * mean over sentences of InfoNCE

    drop: (vectors, keys) -> what the decoder reads (dropout; None: the vectors). contrast_weight: None leaves out the
    term in which InfoNCE of cosines finds a contextual vector's own among batch["semantic"], [B, M, D], of a frozen
    encoder. The anchor is the contextual vector, as in the paper; in the released code it is the other. capacity: see
    `make_latent_loss`.
    """
    weights = {"nll": 1.0} if contrast_weight is None else {"nll": 1.0, "info_nce": contrast_weight}

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        found, there = vectors(params, batch), sentences(batch)
        read = found if drop is None else drop(found, key)
        terms = {"nll": _per_token(read, batch, params, states, stats, capacity)}
        if "info_nce" in weights:
            nce = latent_info_nce(found, batch["semantic"], mask=there, temperature=temperature)
            terms["info_nce"] = masked_mean(nce, there)
        return _weighted(terms, weights, there)

    return loss_fn


def make_latent_loss(
    predict: Callable[..., Any], states: States, stats: HeadStats, *, weights: Mapping[str, float],
    temperature: float = 0.1, capacity: int | None = None,
) -> LossFn:  # fmt: skip
    """Predicting batch["vectors"], [B, M, E], of a frozen encoder; gradients pass through the frozen decoder.

        sum of weights[name] * mean of the term, over

        nll        -log p(s_i | P2(o_i)) of the decoder, per token                              the paper's, weight 1
        info_nce   of cos(o_i, P1(h_j)) / temperature, over sentences of the global batch       the paper's, weight 1
        tie        |o_i - stop_gradient(P1(h_i))|^2 / Z: the scale that the cosine leaves free  ours
        mse        |P2(o_i) - h_i|^2 / D, in the encoder's space                                for comparison
        stop       of the classifier that finds the last sentence among the o_i, which alone it moves

    predict: (params, batch, vectors, mask, key) -> `jaxlm.models.latent.Predicted`. capacity: the most sentences that
    any batch has; the decoder then reads so many instead of B * M, much of which can be padding (None: all). A batch
    with more gives NaN, which a training step refuses. The loss reads `frozen`: the decoder's parameters.
    """
    unknown = sorted(set(weights) - set(TERMS))
    if unknown or not weights:
        raise ValueError(f"weights: expected {', '.join(TERMS)}, or some of them; found {unknown or 'none'}")

    def loss_fn(params: Params, batch: Batch, key: Array | None, frozen: Params = None) -> Any:
        there, h = sentences(batch), batch["vectors"]
        found = predict(params, batch, h, there, key)
        terms = {}
        if "nll" in weights:
            terms["nll"] = _per_token(found.sentence, batch, frozen, states, stats, capacity)
        if "info_nce" in weights:
            nce = latent_info_nce(found.output, found.target, mask=there, temperature=temperature)
            terms["info_nce"] = masked_mean(nce, there)
        if "tie" in weights:
            target = jax.lax.stop_gradient(found.target)
            terms["tie"] = masked_mean(latent_squared_error(found.output, target, mask=there), there)
        if "mse" in weights:
            terms["mse"] = masked_mean(latent_squared_error(found.sentence, h, mask=there), there)
        if "stop" in weights:
            last = there & ~jnp.pad(there[:, 1:], ((0, 0), (0, 1)))
            terms["stop"] = masked_mean(termination(found.stop_logit, last, mask=there), there)
        return _weighted(terms, weights, there)

    return loss_fn


def _per_token(
    read: Array, batch: Batch, params: Params, states: States, stats: HeadStats, capacity: int | None
) -> Float[Array, ""]:
    """The sentences' cross-entropy given their vectors, averaged over tokens."""
    vectors, tokens, segments = (
        x.reshape(-1, x.shape[-1]) for x in (read, batch["steps"], batch["step_segments"])
    )  # fmt: skip
    mask = segments != 0
    count = jnp.maximum(jnp.sum(mask), 1)
    if capacity is not None and capacity < len(tokens):
        there = mask[:, 0]
        kept = jnp.argsort(~there, stable=True)[:capacity]  # the sentences that there are first, in order
        vectors, tokens, segments, mask = (x[kept] for x in (vectors, tokens, segments, mask))
        count = jnp.where(jnp.sum(there) > capacity, jnp.nan, count)
    hidden = states(params, vectors, tokens, segments)
    logprob = stats(params, hidden, tokens, mask, ("logprob",)).logprob
    assert logprob is not None
    return -jnp.sum(logprob) / count


def _weighted(terms: dict[str, Array], weights: Mapping[str, float], there: Array) -> tuple[Array, Array, Metrics]:
    rows = jnp.float32(there.shape[0])
    total = sum((weights[name] * term for name, term in terms.items()), start=jnp.zeros(()))
    metrics: Metrics = {name: (term * rows, rows) for name, term in terms.items()}
    return total * rows, rows, {"loss": (total * rows, rows)} | metrics
