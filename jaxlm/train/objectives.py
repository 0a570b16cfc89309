"""Where a model meets a loss, and the only place: scores of a batch, and losses made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.losses.lm import next_token_nll
from jaxlm.losses.lm import z_loss as z_penalty
from jaxlm.ops.masked import masked_sum
from jaxlm.ops.platform import platform
from jaxlm.ops.token_stats import (
    TokenStats,
    one_pass_nll,
    token_stats,
    token_stats_from_logits,
    token_stats_sharded,
)
from jaxlm.sharding.rules import RULES
from jaxlm.typing import Apply, Array, Batch, Bool, Float, Key, LossFn, Metrics, Params

Score = Callable[[Params, Batch, "Key[Array, 'B'] | None", Collection[str]], TokenStats]
"""(params, batch, row keys, outputs) -> statistics of the batch's targets, each [B, T]; 0 where its mask is False."""

Nll = Callable[[Params, Batch, "Key[Array, 'B'] | None", float], tuple[Array, TokenStats]]
"""(params, batch, row keys, z weight) -> sum over the mask of -logprob + z weight * logsumexp^2, and the statistics."""

Head = Callable[[Params], dict[str, Any]]
"""params -> the keyword arguments of `token_stats` that are the unembedding: unembed [V, D], bias, soft_cap."""

HeadStats = Callable[[Params, Array, Array, Array, Collection[str]], TokenStats]
"""(params, hidden [B, T, D], targets [B, T], mask [B, T], outputs) -> the statistics, each [B, T]."""


def make_head_stats(head: Head, mesh: Mesh | None = None) -> HeadStats:
    """The statistics of targets given hidden states, through the hot path: no [tokens, vocab] array is ever held.

    On a mesh of several devices each scores its own tokens against its own share of the vocabulary; where jit is off,
    to debug, it is one op on whole arrays, since `shard_map` would run every operation of every device by itself.
    """

    def stats(params: Params, hidden: Array, targets: Array, mask: Array, outputs: Collection[Any]) -> TokenStats:
        where = dict(head(params), mask=mask, outputs=outputs)
        if mesh is None or mesh.size == 1 or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return token_stats(hidden, targets=targets, **where)
        return token_stats_sharded(
            hidden,
            targets=targets,
            mesh=mesh,
            token_axes=(RULES["batch"], RULES["length"]),
            vocab_axis="tensor" if mesh.shape["tensor"] > 1 else None,
            width_axis="fsdp" if mesh.shape["fsdp"] > 1 else None,
            **where,
        )

    return stats


def make_hidden_scorer(apply: Apply, head: Head, *, mesh: Mesh | None = None, capacity: int | None = None) -> Score:
    """Scores a model that returns hidden states, by `make_head_stats`.

    capacity: the most targets that any row has; only so many positions of each row then meet the vocabulary, and
    prompts cost nothing there (None: all T do). A row with more gets NaN, which a training step refuses.
    """
    stats = make_head_stats(head, mesh)

    def score(params: Params, batch: Batch, key: Array | None, outputs: Collection[Any]) -> TokenStats:
        hidden = _apply(apply, params, batch, key)
        if capacity is None or capacity >= hidden.shape[1]:
            return stats(params, hidden, batch["targets"], batch["mask"], outputs)
        mask = batch["mask"]
        kept = jnp.argsort(~mask, axis=1, stable=True)[:, :capacity]  # the targets' positions first, in order
        targets, present = (jnp.take_along_axis(x, kept, axis=1) for x in (batch["targets"], mask))
        compact = stats(params, jnp.take_along_axis(hidden, kept[..., None], axis=1), targets, present, outputs)
        return TokenStats(*(None if x is None else _spread(x, mask) for x in compact))

    return score


def _spread(x: Float[Array, "B C"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """The values of each row's targets at their places; 0 elsewhere, NaN where there are more targets than values."""
    rank = jnp.cumsum(mask, axis=1) - 1
    placed = jnp.take_along_axis(x, jnp.clip(rank, 0, x.shape[1] - 1), axis=1)
    return jnp.where(mask, jnp.where(rank < x.shape[1], placed, jnp.nan), 0.0)


def make_logits_scorer(apply: Apply) -> Score:
    """Scores any model that returns logits [B, T, V]: a Linen or NNX module, or a plain function of yours."""

    def score(params: Params, batch: Batch, key: Array | None, outputs: Collection[Any]) -> TokenStats:
        logits = _apply(apply, params, batch, key)
        return token_stats_from_logits(logits, batch["targets"], mask=batch["mask"], outputs=outputs)

    return score


def make_hidden_nll(apply: Apply, head: Head, *, mesh: Mesh | None = None) -> Nll:
    """The summed loss of a model that returns hidden states.

    On one CPU its gradient is made in the forward pass (`one_pass_nll`); elsewhere it is the sum of the scores.
    """
    if platform() != "cpu" or (mesh is not None and mesh.size > 1):
        return _summed(make_hidden_scorer(apply, head, mesh=mesh))

    def nll(params: Params, batch: Batch, key: Array | None, z_weight: float) -> tuple[Array, TokenStats]:
        hidden = _apply(apply, params, batch, key)
        options = dict(head(params), mask=batch["mask"], outputs=_outputs(z_weight))
        return one_pass_nll(hidden, targets=batch["targets"], z_weight=z_weight, **options)

    return nll


def make_logits_nll(apply: Apply) -> Nll:
    """The summed loss of any model that returns logits [B, T, V]."""
    return _summed(make_logits_scorer(apply))


def _summed(score: Score) -> Nll:
    def nll(params: Params, batch: Batch, key: Array | None, z_weight: float) -> tuple[Array, TokenStats]:
        stats = score(params, batch, key, _outputs(z_weight))
        loss = next_token_nll(stats.logprob)
        if z_weight:
            loss = loss + z_penalty(stats.logsumexp, weight=z_weight)
        return masked_sum(loss, batch["mask"]), stats

    return nll


def _outputs(z_weight: float) -> tuple[str, ...]:
    return ("logprob", "entropy", "logsumexp") if z_weight else ("logprob", "entropy")


def _apply(apply: Apply, params: Params, batch: Batch, key: Array | None) -> Array:
    return apply(params, batch["inputs"], positions=batch.get("positions"), segments=batch.get("segments"), key=key)


def make_next_token_loss(nll: Nll, *, z_loss: float = 0.0) -> LossFn:
    """Next-token prediction: the sum of -log p(target) over the mask, and the number of targets as its weight.

        total = sum_t mask_t (-logprob_t + z_loss * logsumexp_t^2)        weight = sum_t mask_t

    Pretraining (mask everywhere) and SFT (mask on completions) are this one loss. Metrics: loss (nats per target,
    without the z term), entropy (of the model's prediction, nats), bits_per_byte (of text; the targets' bits over the
    bytes they stand for), z_loss, tokens (targets per step).
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        total, stats = nll(params, batch, key, z_loss)
        mask = batch["mask"]
        nats = masked_sum(next_token_nll(stats.logprob), mask)
        weight = jnp.sum(mask, dtype=jnp.float32)
        metrics = {
            "loss": (nats, weight),
            "entropy": (masked_sum(stats.entropy, mask), weight),
            "tokens": (weight, None),
        }
        if "target_bytes" in batch:
            num_bytes = masked_sum(batch["target_bytes"].astype(jnp.float32), mask)
            metrics["bits_per_byte"] = (nats / math.log(2), num_bytes)
        if z_loss:
            # Summed by itself: as the difference of two large sums it would lose its digits.
            metrics["z_loss"] = (masked_sum(z_penalty(stats.logsumexp, weight=z_loss), mask), weight)
        return total, weight, metrics

    return loss_fn
