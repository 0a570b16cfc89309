"""Preference losses that hold each response against the reference itself, or against others sorted over the batch.

Their zero is "as likely as under the reference", not the other response, so they take no f-divergence map.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.losses.scores import (
    Scalar,
    check_beta,
    check_one_shape,
    log_ratio,
    logistic_loss,
    smoothed_logistic_loss,
    wide,
)
from jaxlm.typing import Array, Float


def nca(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
) -> Float[Array, "B"]:
    """Noise-contrastive alignment on pairs: raises the chosen reward itself, not only above the rejected one.

        loss = -log sigmoid(beta a) - 1/2 log sigmoid(-beta a) - 1/2 log sigmoid(-beta b)
        a, b = log pi/pi_ref of the chosen, the rejected

    policy_*, reference_*: [B] summed log-probabilities of the completions, nats, at most 0. beta: positive.

    Result: [B] nats, at least 0; 2 log 2 where the policy equals the reference. Numerics: float32 or wider; finite
    with finite gradients for sums of 1e4 nats and more.

    Source: Chen et al. 2024, arXiv:2402.05369, for two responses. As in TRL's "nca_pair" of 1.16; 1.10 mapped a and b
    by the f-divergence.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{nca(*policy, *reference, beta=0.1)[0]:.6f}")
    1.350825
    """
    chosen, rejected = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    return logistic_loss(chosen) + 0.5 * logistic_loss(-chosen) + 0.5 * logistic_loss(-rejected)


def bco_pair(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
) -> Float[Array, "B"]:
    """Binary classifier optimisation on pairs: each response classified on its own, chosen as 1, rejected as 0.

        loss = -log sigmoid(beta a) - log sigmoid(-beta b)

    Arguments and numerics as in `nca`. Result: [B] nats, at least 0; 2 log 2 where the policy equals the reference.

    Source: Jung et al. 2024, arXiv:2404.04656, without the reward shift. As in TRL's "bco_pair" of 1.16; EasyDeL and
    LLaMA-Factory subtract a mean reward from both, which is `jaxlm.losses.bco` on the two responses.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{bco_pair(*policy, *reference, beta=0.1)[0]:.6f}")
    1.312856
    """
    chosen, rejected = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    return logistic_loss(chosen) + logistic_loss(-rejected)


def sppo_hard(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
) -> Float[Array, "B"]:
    """Self-play preference optimisation with hard labels: regresses each log-ratio on plus or minus 1 / (2 beta).

        loss = (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2

    Arguments and numerics as in `nca`. Result: [B], at least 0; 1 / (2 beta^2) where the policy equals the reference.

    Source: Wu et al. 2024, arXiv:2405.00675, equation 4.7 with a win probability of 1 for the chosen and 0 for the
    rejected (the paper estimates it with a judge). As in TRL's "sppo_hard".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{sppo_hard(*policy, *reference, beta=0.1)[0]:.6f}")
    36.250000
    """
    check_beta(beta)
    check_one_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    target = 0.5 / beta
    chosen, rejected = log_ratio(policy_chosen, reference_chosen), log_ratio(policy_rejected, reference_rejected)
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def apo_zero(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
) -> Float[Array, "B"]:
    """Anchored preference optimisation, zero: raises the chosen and lowers the rejected, each towards saturation.

        loss = 1 - sigmoid(beta a) + sigmoid(beta b)

    For chosen responses better than the model's own. Arguments and numerics as in `nca`. Result: [B], in [0, 2]; 1
    where the policy equals the reference.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7. As in TRL's "apo_zero".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{apo_zero(*policy, *reference, beta=0.1)[0]:.6f}")
    0.962523
    """
    chosen, rejected = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
) -> Float[Array, "B"]:
    """Anchored preference optimisation, down: lowers both responses, the rejected one more.

        loss = sigmoid(beta a) + 1 - sigmoid(beta (a - b))

    For chosen responses worse than the model's own. Arguments and numerics as in `nca`. Result: [B], in [0, 2]; 1
    where the policy equals the reference.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8. As in TRL's "apo_down" of 1.16; 1.10 mixed the
    plain a with an f-mapped margin.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{apo_down(*policy, *reference, beta=0.1)[0]:.6f}")
    0.987549
    """
    chosen, rejected = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def aot(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, "B"]:
    """Alignment by optimal transport: the policy's margins must dominate the reference's, quantile by quantile.

        loss_k = smoothed logistic(beta (p_(k) - r_(k)))        smoothed logistic as in `cdpo`
        p = sort(policy_chosen - policy_rejected)        r = sort(reference_chosen - reference_rejected)

    Arguments as in `nca`. label_smoothing: in [0, 0.5). Result: [B] nats, at least 0, **by rank, not by row**: only
    sums and means of it have a meaning, so weights per pair (WPO) do not apply. It is coupled over the batch: every
    row counts (no padding rows), a split into micro-batches changes it, and for B = 1 it is `cdpo`. log 2 where the
    policy equals the reference. Numerics as in `nca`; differentiable through the sort, which only permutes.

    Source: Melnyk et al. 2024, arXiv:2406.05882. As in TRL's "aot".

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([[-20.0, -10.0], [-25.0, -9.0]]), jnp.array([[-21.0, -9.0], [-24.5, -9.5]])
    >>> aot(*policy, *reference, beta=0.1).round(4).tolist()
    [0.770..., 0.620...]
    """
    check_beta(beta)
    check_one_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_one_shape(policy_chosen=policy_chosen, reference_chosen=reference_chosen)
    policy = jnp.sort(wide(policy_chosen) - wide(policy_rejected), axis=0)
    reference = jnp.sort(log_ratio(reference_chosen, reference_rejected), axis=0)
    return smoothed_logistic_loss(beta * (policy - reference), label_smoothing)


def aot_unpaired(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, "B"]:
    """Alignment by optimal transport, unpaired: chosen rewards must dominate rejected ones, quantile by quantile.

        loss_k = smoothed logistic(beta (a_(k) - b_(k)))        a, b sorted, each over the batch

    The chosen and the rejected responses need not answer the same prompts, but there must be as many. Arguments,
    result (by rank, coupled over the batch) and numerics as in `aot`.

    Source: Melnyk et al. 2024, arXiv:2406.05882. As in TRL's "aot_unpaired".

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([[-20.0, -10.0], [-25.0, -9.0]]), jnp.array([[-21.0, -9.0], [-24.5, -9.5]])
    >>> aot_unpaired(*policy, *reference, beta=0.1).round(4).tolist()
    [0.718..., 0.668...]
    """
    chosen, rejected = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    return smoothed_logistic_loss(jnp.sort(chosen, axis=0) - jnp.sort(rejected, axis=0), label_smoothing)


def _rewards(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    beta: Scalar,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """beta a and beta b."""
    check_beta(beta)
    check_one_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    chosen, rejected = log_ratio(policy_chosen, reference_chosen), log_ratio(policy_rejected, reference_rejected)
    return beta * chosen, beta * rejected
