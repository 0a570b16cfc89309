"""Masked language modelling: which tokens are hidden from the model, and the loss of guessing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.losses.lm import cross_entropy
from jaxlm.ops.masked import masked_count, masked_sum
from jaxlm.typing import Array, Bool, Float, Int, Key, Metrics

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1


class MaskedTokens(NamedTuple):
    """tokens: what the model reads. chosen: True where it is asked which token stood there."""

    tokens: Int[Array, "B T"]
    chosen: Bool[Array, "B T"]


def mask_tokens(
    tokens: Int[Array, "B T"],
    key: Key[Array, "..."],
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
    mask: Bool[Array, "B T"] | None = None,
    rate: float = 0.15,
) -> MaskedTokens:
    """Hides a random share of the tokens by BERT's rule: 80 % become [MASK], 10 % any token, 10 % stay as they are.

        chosen_t ~ Bernoulli(rate) where mask_t and tokens_t is not special, else False

    tokens: [B, T] ids in [0, vocab_size). key: one per row, or one to be split into rows; a row's draws depend on its
    own key alone. mask_id: of [MASK]. special_ids: never chosen ([CLS], [SEP], padding, …; () if there are none).
    mask: [B, T] boolean, False (padding) is never chosen (None: all True). rate: a share in [0, 1].

    Result: tokens [B, T] of the given dtype, and chosen [B, T] boolean; the given tokens are the targets. How many are
    chosen varies, and may be none. The 10 % are drawn from the whole vocabulary, special tokens included. Raises
    ValueError for an id outside the vocabulary, a rate outside [0, 1], and keys that do not fit.

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1. Each token is drawn by itself, as in the code of RoBERTa
    and SimCSE; BERT's picks exactly 15 % of a row.

    >>> tokens = jnp.array([[1, 7, 8, 9, 2, 0]])
    >>> masked = mask_tokens(tokens, jax.random.key(0), mask_id=3, vocab_size=10, special_ids=(0, 1, 2, 3), rate=1.0)
    >>> masked.chosen.astype(int).tolist(), masked.tokens[0, 4:].tolist()
    ([[0, 1, 1, 1, 0, 0]], [2, 0])
    """
    _check(tokens, key, mask_id, vocab_size, special_ids, mask, rate)
    keys = jax.random.split(key, tokens.shape[0]) if key.ndim == 0 else key
    pick, fate, other = jax.vmap(lambda k: _draws(k, tokens.shape[1], vocab_size))(keys)
    special = jnp.isin(tokens, jnp.asarray(special_ids, tokens.dtype)) if len(special_ids) else jnp.zeros((), bool)
    chosen = (pick < rate) & ~special & (True if mask is None else mask)
    hidden = jnp.where(fate < MASK_SHARE, mask_id, jnp.where(fate < MASK_SHARE + RANDOM_SHARE, other, tokens))
    return MaskedTokens(jnp.where(chosen, hidden, tokens).astype(tokens.dtype), chosen)


def _draws(key: Array, length: int, vocab_size: int) -> tuple[Array, Array, Array]:
    pick, fate, other = jax.random.split(key, 3)
    uniform = jax.random.uniform(pick, (length,)), jax.random.uniform(fate, (length,))
    return *uniform, jax.random.randint(other, (length,), 0, vocab_size)


def _check(
    tokens: Array, key: Array, mask_id: int, vocab_size: int, special_ids: Sequence[int], mask: Array | None,
    rate: float,
) -> None:  # fmt: skip
    if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
        found = f"tokens {tokens.shape}" + ("" if mask is None else f" and mask {mask.shape}")
        raise ValueError(f"tokens and mask must be [B, T], found {found}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), tokens.shape[:1]):
        raise ValueError(
            f"key must be one jax.random.key, or one for each of {tokens.shape[0]} rows; found {key.dtype} of shape "
            f"{key.shape}"
        )
    outside = [i for i in (mask_id, *special_ids) if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(f"mask_id and special_ids must be in [0, {vocab_size}), found {outside}: is vocab_size right?")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be a share in [0, 1], found {rate}: 15 % is 0.15")


def masked_lm(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    chosen: Bool[Array, "B T"],
    *,
    bias: Float[Array, "V"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
    """Cross-entropy of the tokens that were hidden, as a sum and its weight, without ever holding [tokens, vocab].

        total = -sum_t chosen_t log softmax(unembed @ hidden_t + bias)[targets_t]        weight = sum_t chosen_t

    hidden: [B, T, D], from `jaxlm.models.masked_lm.transform`. unembed: [V, D]. targets: [B, T], the tokens before
    `mask_tokens`. chosen: [B, T], its choice. bias: [V]. implementation: as in `jaxlm.ops.token_stats`.

    Result: (total, weight, metrics), sums that add up over any split of the batch; nats and tokens, float32. With
    nothing chosen both are 0, and so is the gradient. metrics: masked_lm (nats per chosen token), masked_tokens (chosen
    tokens per step). As an auxiliary term, add a multiple of total / max(weight, 1).

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1; beside a contrastive loss with weight 0.1, Gao et al.
    2021, arXiv:2104.08821, section 6.3.

    >>> chosen = jnp.array([[True, False, True]])
    >>> total, weight, _ = masked_lm(jnp.ones((1, 3, 2)), jnp.zeros((4, 2)), jnp.array([[3, 0, 1]]), chosen)
    >>> print(f"{total:.3f} {weight}")  # 2 log 4
    2.773 2.0
    """
    loss = cross_entropy(hidden, unembed, targets, mask=chosen, bias=bias, implementation=implementation)
    total, weight = masked_sum(loss, chosen), masked_count(loss, chosen)
    return total, weight, {"masked_lm": (total, weight), "masked_tokens": (weight, None)}
