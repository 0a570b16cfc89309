"""What changes a preference loss from outside: sums of losses, desensitised lengths, weights, a moving reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.losses.scores import Scalar, check_number, check_one_shape, wide
from jaxlm.ops.masked import masked_mean, masked_sum
from jaxlm.typing import Array, Bool, Float, Params


def weighted_sum(losses: Sequence[Float[Array, "B"]], weights: Sequence[Scalar]) -> Float[Array, "B"]:
    """Several losses of the same pairs as one.

        loss = sum_k weight_k loss_k

    losses: each [B], unreduced. weights: one number per loss, finite. Result: [B]. MPO, for one, is 0.8 `dpo`, 0.2
    `bco_pair` and 1.0 `sft`. Losses by rank (`aot`) may take part where only the sum over the batch is used.

    Source: MPO, Wang et al. 2024, arXiv:2411.10442. As TRL's loss_weights.

    >>> import jax.numpy as jnp
    >>> weighted_sum([jnp.array([1.0, 2.0]), jnp.array([10.0, 0.0])], [0.5, 0.1]).tolist()
    [1.5, 1.0]
    """
    if not losses or len(losses) != len(weights):
        raise ValueError(
            f"expected one weight per loss and at least one loss, found {len(losses)} losses and {len(weights)} weights"
            "; give weights as one sequence, in the order of the losses"
        )
    check_one_shape(**{f"losses[{k}]": loss for k, loss in enumerate(losses)})
    for k, weight in enumerate(weights):
        check_number(f"weights[{k}]", weight, "to be finite", math.isfinite, "leave a loss out with weight 0")
    return sum(weight * loss for loss, weight in zip(losses[1:], weights[1:])) + weights[0] * losses[0]


def length_desensitised_sums(
    chosen_logprob: Float[Array, "B T_chosen"],
    rejected_logprob: Float[Array, "B T_rejected"],
    *,
    chosen_mask: Bool[Array, "B T_chosen"],
    rejected_mask: Bool[Array, "B T_rejected"],
    ld_alpha: Scalar,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Sums of token log-probabilities in which the excess length of the longer response of a pair counts less.

        sum_{t <= m} logprob_t + ld_alpha sum_{t > m} logprob_t        m = min(n_chosen, n_rejected)

    *_logprob: [B, T] nats, one per token, the two of any widths. *_mask: [B, T] boolean, True on completion tokens,
    which are what t counts. ld_alpha: in [0, 1]; 1 is the plain sum, 0 cuts both to the shorter length. Apply it to the
    policy and to the reference (LLaMA-Factory applies it to the policy alone).

    Result: (chosen, rejected), each [B], nats, for any loss that takes sums. Numerics: float32 or wider; a NaN under
    the mask reaches neither value nor gradient; with an empty completion m is 0.

    Source: Liu et al. 2024 (LD-DPO), arXiv:2409.06411. As TRL's ld_alpha.

    >>> import jax.numpy as jnp
    >>> chosen, rejected = jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[-3.0, -5.0, 0.0]])
    >>> masks = {"chosen_mask": jnp.array([[True] * 3]), "rejected_mask": jnp.array([[True, True, False]])}
    >>> [total.tolist() for total in length_desensitised_sums(chosen, rejected, **masks, ld_alpha=0.5)]
    [[-5.0], [-8.0]]
    """
    fix = "1 is the plain sum, 0 ignores all tokens past the shorter response"
    check_number("ld_alpha", ld_alpha, "in [0, 1]", lambda v: 0 <= v <= 1, fix)
    check_one_shape(chosen_logprob=chosen_logprob, chosen_mask=chosen_mask)
    check_one_shape(rejected_logprob=rejected_logprob, rejected_mask=rejected_mask)
    shared = jnp.minimum(chosen_mask.sum(axis=1), rejected_mask.sum(axis=1))[:, None]

    def total(logprob: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
        excess = jnp.cumsum(mask, axis=1) > shared
        kept = masked_sum(logprob, mask & ~excess, axis=1)
        return kept + ld_alpha * masked_sum(logprob, mask & excess, axis=1)

    return total(chosen_logprob, chosen_mask), total(rejected_logprob, rejected_mask)


def wpo_weight(
    logprob: Float[Array, "B T"], log_sum_p2: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Weight of a response by how likely the policy itself is to write it: WPO, which makes old data nearly on-policy.

        w = exp(mean_t [logprob_t - log sum_v p_t(v)^2])        gradient stopped

    logprob: [B, T] of the policy, nats. log_sum_p2: [B, T] log of the sum over the vocabulary of the squared
    probabilities, nats, at most 0. mask: [B, T] boolean, True keeps. Multiply a loss [B] by the product of the weights
    of its responses; not one by rank (`aot`), whose values belong to no pair.

    Result: [B], positive, without gradient; about 1 for a response the policy samples, 1 for an empty one. Numerics:
    float32 or wider.

    Source: Zhou et al. 2024, arXiv:2406.11827, equation 2. As TRL's use_weighting; open-instruct instead takes
    min(1, exp(mean logprob of the chosen + that of the rejected)).

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, True, False]])
    >>> wpo_weight(jnp.full((1, 3), -1.0), jnp.full((1, 3), -1.5), mask).round(4).tolist()
    [1.648...]
    """
    check_one_shape(logprob=logprob, log_sum_p2=log_sum_p2, mask=mask)
    return jax.lax.stop_gradient(jnp.exp(masked_mean(wide(logprob) - wide(log_sum_p2), mask, axis=1)))


def mix_reference(policy: Params, reference: Params, *, policy_weight: Scalar = 0.6) -> Params:
    """The reference moved towards the policy: one update of TR-DPO.

        reference <- policy_weight policy + (1 - policy_weight) reference

    policy, reference: parameter trees of one structure. policy_weight: in [0, 1]; 1 copies the policy. Usual is 0.6
    every 512 steps, as in TRL. Result: a tree like the reference, in its dtypes.

    Source: Gorbatovski et al. 2024 (TR-DPO), arXiv:2404.09656.

    >>> import jax.numpy as jnp
    >>> mix_reference({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 0.0])}, policy_weight=0.5)["w"].tolist()
    [0.5, 0.0]
    """
    fix = "0 keeps the reference, 1 copies the policy"
    check_number("policy_weight", policy_weight, "in [0, 1]", lambda v: 0 <= v <= 1, fix)

    def mix(new: Array, old: Array) -> Array:
        return (policy_weight * new + (1 - policy_weight) * old).astype(old.dtype)

    return jax.tree.map(mix, policy, reference)
