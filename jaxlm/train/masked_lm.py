"""Masked language modelling for the trainer: alone, or as a further loss beside a contrastive one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.losses.masking import MaskedTokens, masked_lm
from jaxlm.typing import Array, Batch, Key, LossFn, Metrics, Params

MaskFn = Callable[..., MaskedTokens]
"""(tokens, row keys, *, mask) -> what is read and what is asked: `jaxlm.losses.mask_tokens` with its ids bound."""


def make_masked_lm_loss(
    forward: Callable[..., Array], head: Callable[[Params], dict[str, Any]], mask: MaskFn, *, scale: float = 1.0
) -> LossFn:
    """Guessing masked tokens: the sum of the cross-entropy over the chosen ones, and their number as its weight.

        total = -scale * sum_t chosen_t log p(tokens_t)        weight = sum_t chosen_t

    forward: (params, tokens, *, segments, key) -> the states that meet the unembedding [B, T, D], such as
    `jaxlm.models.masked_lm.transform` of an encoder's. head: params -> the unembedding, as `jaxlm.losses.masked_lm`
    takes it. scale: of this loss beside another (SimCSE: 0.1); the metrics are without it. The batch holds tokens and
    segments (0 is padding). Dropout and masks draw from streams of their own; without keys there is no dropout, and the
    masks are the same at every call, so that an evaluation is too.
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "B"] | None) -> tuple[Array, Array, Metrics]:
        tokens, segments = batch["tokens"], batch["segments"]
        draws, dropout = jax.random.key(0), None
        if key is not None:
            draws, dropout = (jax.vmap(jax.random.fold_in, (0, None))(key, stream) for stream in (0, 1))
        masked = mask(tokens, draws, mask=segments != 0)
        states = forward(params, masked.tokens, segments=segments, key=dropout)
        total, weight, metrics = masked_lm(states, targets=tokens, chosen=masked.chosen, **head(params))
        return scale * total, weight, metrics

    return loss_fn
