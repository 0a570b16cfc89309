"""Preference losses on single responses with a label, desirable or not; one value per response."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxlm.losses.scores import Scalar, check_beta, check_number, check_one_shape, log_ratio, logistic_loss, wide
from jaxlm.ops.masked import masked_count, masked_mean, masked_sum
from jaxlm.typing import Array, Bool, Float, Int


def kto(
    policy: Float[Array, "B"],
    reference: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    beta: Scalar,
    baseline: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> Float[Array, "B"]:
    """Kahneman-Tversky optimisation: the gain of a response over a baseline, saturating on both sides.

        loss = w_d (1 - sigmoid(beta (u - z)))        where desirable        u = log pi/pi_ref of the response
        loss = w_u (1 - sigmoid(beta (z - u)))        where not

    policy, reference: [B] summed log-probabilities of the completions, nats, at most 0. desirable: [B] boolean.
    beta: positive; 0.1 is usual. baseline: z, nats, at least 0, from `kto_baseline`; its gradient is stopped here.
    *_weight: at least 0; with uneven labels choose w_d n_desirable / (w_u n_undesirable) in [1, 4/3].

    Result: [B], in [0, weight], row by row (TRL's are sorted, desirable first); half the weight where the policy equals
    the reference and z is 0. Numerics: float32 or wider; finite with finite gradients for sums of 1e4 nats and more.
    Any batch size, any mix of labels.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8. As in TRL.

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([-20.0, -25.0]), jnp.array([-21.0, -24.5])
    >>> loss = kto(policy, reference, jnp.array([True, False]), beta=0.1, baseline=0.2)
    >>> print(f"{loss[0]:.6f} {loss[1]:.6f}")
    0.480011 0.482507
    """
    check_beta(beta)
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        fix = "it multiplies the loss of its class; 1 is neutral"
        check_number(name, weight, "at least 0 and finite", lambda v: 0 <= v < math.inf, fix)
    check_one_shape(policy=policy, desirable=desirable)
    gain = beta * (log_ratio(policy, reference) - jax.lax.stop_gradient(baseline))
    loss = jax.nn.sigmoid(jnp.where(desirable, -gain, gain))
    return loss * jnp.where(desirable, desirable_weight, undesirable_weight)


def kto_baseline(
    policy_mismatched: Float[Array, "B"],
    reference_mismatched: Float[Array, "B"],
    mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """KTO's baseline: a biased estimate of KL(pi || pi_ref) from prompts with the completions of other rows.

        z = max(0, mean_i log pi(y_j | x_i) - log pi_ref(y_j | x_i))        j = mismatched_rows(B)[i]

    *_mismatched: [B] summed log-probabilities of the mismatched completions, nats. mask: [B] boolean, True keeps: rows
    that have a mismatched completion (None: all). Result: scalar, nats, at least 0; 0 if no row has one. The mean is
    over the global batch where the arrays are sharded; over micro-batches it differs between them, as in TRL.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306. As in TRL.

    >>> import jax.numpy as jnp
    >>> float(kto_baseline(jnp.array([-30.0, -40.0]), jnp.array([-31.0, -40.0])))
    0.5
    """
    return jnp.maximum(masked_mean(log_ratio(policy_mismatched, reference_mismatched), mask), 0)


def mismatched_rows(num_rows: int) -> Int[Array, "B"]:
    """For each row of a batch, the row whose completion it borrows for `kto_baseline`: the one before it.

        j(i) = (i - 1) mod B

    num_rows: B, at least 2: a single row could only borrow its own completion, and z would then be the very reward it
    is subtracted from, so that is refused. Every completion is borrowed once and no row borrows its own, for odd
    batches too. Rows that repeat one completion stay a match by content; spread them over batches.

    Source: TRL, which rotates in the same way over each batch of its data.

    >>> mismatched_rows(3).tolist()
    [2, 0, 1]
    """
    if num_rows < 2:
        raise ValueError(
            f"expected at least 2 rows to mismatch, found {num_rows}; raise the batch size, pass baseline=0.0 to kto, "
            "or take apo_zero_unpaired, which needs no baseline"
        )
    return jnp.roll(jnp.arange(num_rows), 1)


def bco(
    policy: Float[Array, "B"],
    reference: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    beta: Scalar,
    baseline: Scalar,
) -> Float[Array, "B"]:
    """Binary classifier optimisation: classifies each response by its reward, shifted by the mean reward.

        loss = -log sigmoid(beta u - d)        where desirable        u = log pi/pi_ref of the response
        loss = -log sigmoid(-(beta u - d))     where not

    policy, reference, desirable, beta: as in `kto`. baseline: d, in units of the reward beta u, from `bco_baseline`;
    its gradient is stopped here. Result: [B] nats, at least 0; log 2 where the policy equals the reference and d is 0.
    Numerics as in `kto`. Where the prompts of the two classes differ, multiply by `bco_density_weight`.

    Source: Jung et al. 2024, arXiv:2404.04656. As in TRL 1.10; 1.16 no longer has it.

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([-20.0, -25.0]), jnp.array([-21.0, -24.5])
    >>> bco(policy, reference, jnp.array([True, False]), beta=0.1, baseline=0.025).round(4).tolist()
    [0.656..., 0.656...]
    """
    check_beta(beta)
    check_one_shape(policy=policy, desirable=desirable)
    reward = beta * log_ratio(policy, reference) - jax.lax.stop_gradient(baseline)
    return logistic_loss(jnp.where(desirable, reward, -reward))


def bco_baseline(
    policy: Float[Array, "B"],
    reference: Float[Array, "B"],
    *,
    beta: Scalar,
    mask: Bool[Array, "B"] | None = None,
    previous: tuple[Scalar, Scalar] = (0.0, 0.0),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean reward of all responses so far, which is BCO's shift, and how many they are.

        d = (count' d' + sum_i beta u_i) / (count' + B)        previous = (d', count')

    policy, reference, beta: as in `kto`, both classes together. mask: [B] boolean, True keeps (None: all). previous:
    what the last call returned; the default gives the mean of this batch alone. Result: (d, count), scalars.

    Source: Jung et al. 2024, arXiv:2404.04656. TRL's running mean, as state that the caller carries (it belongs in the
    checkpoint); LLaMA-Factory's is the mean of the batch.

    >>> import jax.numpy as jnp
    >>> mean, count = bco_baseline(jnp.array([-20.0, -25.0]), jnp.array([-21.0, -24.5]), beta=0.1)
    >>> print(f"{mean:.3f} {count:.0f}")
    0.025 2
    """
    check_beta(beta)
    reward = beta * log_ratio(policy, reference)
    mean, count = previous
    total = count + masked_count(reward, mask)
    return (count * mean + masked_sum(reward, mask)) / jnp.maximum(total, 1), total


def bco_density_weight(
    desirable_probability: Float[Array, "B"], desirable: Bool[Array, "B"], *, least: float = 0.5, most: float = 10.0
) -> Float[Array, "B"]:
    """Importance weight that makes the undesirable prompts look like the desirable ones.

        weight = clip(p / (1 - p), least, most)        where undesirable, else 1

    desirable_probability: p, [B] in [0, 1], from a classifier that tells the classes' prompts apart. desirable: [B]
    boolean. 0 <= least <= most. Result: [B]. Numerics: p = 1 gives `most`.

    Source: Jung et al. 2024, arXiv:2404.04656; defaults of TRL, which adds 1e-8 to the denominator instead.

    >>> import jax.numpy as jnp
    >>> bco_density_weight(jnp.array([0.75, 1.0, 0.1]), jnp.array([False, False, True])).tolist()
    [3.0, 10.0, 1.0]
    """
    if not 0 <= least <= most < math.inf:
        raise ValueError(f"expected 0 <= least <= most, found least={least} and most={most}; 0.5 and 10 are usual")
    check_one_shape(desirable_probability=desirable_probability, desirable=desirable)
    p = wide(desirable_probability)
    ratio = p / jnp.maximum(1 - p, jnp.finfo(p.dtype).tiny)
    return jnp.where(desirable, 1.0, jnp.clip(ratio, least, most))


def apo_zero_unpaired(
    policy: Float[Array, "B"],
    reference: Float[Array, "B"],
    desirable: Bool[Array, "B"],
    *,
    beta: Scalar,
) -> Float[Array, "B"]:
    """Anchored preference optimisation, zero, on single responses: `kto` with the baseline 0.

        loss = 1 - sigmoid(beta u)        where desirable
        loss = sigmoid(beta u)            where not

    Arguments and numerics as in `kto`. Result: [B], in [0, 1]; 1/2 where the policy equals the reference. The two
    classes of one pair sum to `apo_zero`.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, one response at a time. As in TRL's
    "apo_zero_unpaired", whose class weights are the caller's to multiply.

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([-20.0, -25.0]), jnp.array([-21.0, -24.5])
    >>> loss = apo_zero_unpaired(policy, reference, jnp.array([True, False]), beta=0.1)
    >>> print(f"{loss.sum():.6f}")
    0.962523
    """
    return kto(policy, reference, desirable, beta=beta, baseline=0.0)
