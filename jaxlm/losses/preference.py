"""Preference losses on the margin between two responses, each scored against a reference model; one value per pair.

All take summed log-probabilities of the completions, as `jaxlm.losses.seq_logprob` gives them, in DPO's order. Other
families: `preference_pointwise` (each response against the reference, and sorted over the batch), `preference_free`
(no reference), `preference_unpaired` (single responses with a label), `preference_modifiers`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.losses.scores import (
    Divergence,
    Length,
    Scalar,
    check_beta,
    check_label_smoothing,
    check_number,
    check_one_shape,
    log_ratio,
    logistic_loss,
    per_token,
    reverse_kl,
    smoothed_logistic_loss,
)
from jaxlm.typing import Array, Float


def dpo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Direct preference optimisation: logistic regression of the preference on the margin of the implicit rewards.

        loss = -log sigmoid(beta D)        D = s(a) - s(b)        a, b = log pi/pi_ref of the chosen, the rejected

    policy_*, reference_*: [B] summed log-probabilities of the completions, nats, at most 0. beta: positive; 0.1 is
    usual. divergence: the map s, one of `reverse_kl` (standard), `forward_kl`, `js_divergence`, `alpha_divergence`.

    Result: [B] nats, at least 0; log 2 where the policy equals the reference. Numerics: float32 or wider; finite with
    finite gradients for sums of 1e4 nats and more. Nothing is detached: the caller stops the gradient of a live
    reference.

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7. As in TRL's "sigmoid", which ignores its
    label_smoothing; the smoothed losses are functions of their own, `cdpo` and `robust_dpo`.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{dpo(*policy, *reference, beta=0.1)[0]:.6f}")
    0.620957
    """
    check_beta(beta)
    return logistic_loss(
        beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    )


def cdpo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    label_smoothing: Scalar,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Conservative DPO: `dpo` under labels that are wrong at a known rate, so the margin has a finite target.

        loss = -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)        minimal where sigmoid(beta D) = 1 - e

    Arguments as in `dpo`. label_smoothing: e in [0, 0.5). Result: [B] nats, at least the entropy of e; log 2 where the
    policy equals the reference. Numerics as in `dpo`.

    Source: Mitchell 2023, A note on DPO with noisy preferences. It is what OpenRLHF, Tunix, EasyDeL and open-instruct
    call label smoothing; TRL's DPO trainer has none of it (its CPO and AOT losses do). `robust_dpo` differs: it
    subtracts the flipped term, which makes the loss unbiased under the noise instead of conservative.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{cdpo(*policy, *reference, beta=0.1, label_smoothing=0.1)[0]:.6f}")
    0.635957
    """
    check_beta(beta)
    margin = _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    return smoothed_logistic_loss(beta * margin, label_smoothing)


def robust_dpo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    label_smoothing: Scalar,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Robust DPO: an estimate of the clean `dpo` loss that label noise of a known rate leaves unbiased.

        loss = [-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1 - 2e)

    Arguments as in `dpo`. label_smoothing: e in [0, 0.5). Result: [B] nats, unbounded below for e > 0 (a large margin
    is rewarded without end, unlike in `cdpo`); log 2 where the policy equals the reference. Numerics as in `dpo`.

    Source: Ray Chowdhury et al. 2024, arXiv:2403.00409. As in TRL's "robust".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{robust_dpo(*policy, *reference, beta=0.1, label_smoothing=0.1)[0]:.6f}")
    0.602207
    """
    check_beta(beta)
    check_label_smoothing(label_smoothing)
    margin = beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    clean, flipped = (1 - label_smoothing) * logistic_loss(margin), label_smoothing * logistic_loss(-margin)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def hinge(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Hinge loss on the margin of the implicit rewards: no gradient once the margin reaches 1 / beta.

        loss = max(0, 1 - beta D)

    Arguments as in `dpo`. Result: [B], at least 0; 1 where the policy equals the reference. The gradient at the kink
    is 0. Numerics as in `dpo`.

    Source: Liu et al. 2023 (RSO), arXiv:2309.06657; the reference-free form is SLiC-HF, Zhao et al. 2023,
    arXiv:2305.10425. As in TRL's "hinge".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{hinge(*policy, *reference, beta=0.1)[0]:.6f}")
    0.850000
    """
    check_beta(beta)
    margin = _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    return jax.nn.relu(1 - beta * margin)


def ipo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    chosen_length: Length,
    rejected_length: Length,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Identity preference optimisation, averaged over tokens: regresses the margin per token on 1 / (2 beta).

        loss = (s(a) / n_chosen - s(b) / n_rejected - 1 / (2 beta))^2

    Arguments as in `dpo`. beta: the paper's tau. *_length: [B] tokens of the completions, at least 0 (an empty one
    counts as 1). Result: [B], at least 0; 1 / (4 beta^2) where the policy equals the reference. Numerics as in `dpo`.

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17. The mean per token is not in the paper; its authors told
    TRL's that their results used it. As in TRL's "ipo"; `ipo_sum` is the formula as printed.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> lengths = {"chosen_length": jnp.array([8]), "rejected_length": jnp.array([5])}
    >>> print(f"{ipo(*policy, *reference, beta=0.1, **lengths)[0]:.4f}")
    22.8006
    """
    check_beta(beta)
    chosen, rejected = _scores(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    margin = per_token(chosen, chosen_length) - per_token(rejected, rejected_length)
    return jnp.square(margin - 1 / (2 * beta))


def ipo_sum(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Identity preference optimisation on summed log-ratios: regresses the margin of whole responses on 1 / (2 beta).

        loss = (D - 1 / (2 beta))^2

    Arguments as in `dpo`. Result: [B], at least 0, growing with the square of the length; 1 / (4 beta^2) where the
    policy equals the reference. Numerics as in `dpo`.

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17, as printed. As in OpenRLHF and in TRL's online DPO and
    XPO; TRL's DPO trainer divides by the lengths (`ipo`).

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{ipo_sum(*policy, *reference, beta=0.1)[0]:.6f}")
    12.250000
    """
    check_beta(beta)
    margin = _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    return jnp.square(margin - 1 / (2 * beta))


def dpo_norm(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    chosen_length: Length,
    rejected_length: Length,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Length-normalised DPO: the margin of mean scores per token, so that long responses do not weigh more.

        loss = -log sigmoid(beta (s(a) / n_chosen - s(b) / n_rejected))

    Arguments as in `ipo`. beta: larger than in `dpo`, 5 is usual. Result: [B] nats, at least 0; log 2 where the policy
    equals the reference. Numerics as in `dpo`.

    Source: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124. As in TRL's "sigmoid_norm" and open-instruct's "dpo_norm".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> lengths = {"chosen_length": jnp.array([8]), "rejected_length": jnp.array([5])}
    >>> print(f"{dpo_norm(*policy, *reference, beta=0.1, **lengths)[0]:.6f}")
    0.681960
    """
    check_beta(beta)
    chosen, rejected = _scores(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    return logistic_loss(beta * (per_token(chosen, chosen_length) - per_token(rejected, rejected_length)))


def exo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    label_smoothing: Scalar,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Exact optimisation on pairs: reverse KL from the policy's preference to the smoothed label.

        loss = p (log p - log(1 - e)) + (1 - p) (log(1 - p) - log e)        p = sigmoid(beta D)

    Arguments as in `dpo`. label_smoothing: e in (0, 0.5), not 0, where the loss is infinite; 1e-3 is usual.
    Result: [B] nats, at least 0 and at most -log e; 0 where p = 1 - e. Numerics as in `dpo`; the bounded loss has a
    gradient that vanishes for margins of either sign that are large.

    Source: Ji et al. 2024, arXiv:2402.00856, equation 16 for two responses. As in TRL's "exo_pair".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{exo(*policy, *reference, beta=0.1, label_smoothing=1e-3)[0]:.6f}")
    2.505517
    """
    check_beta(beta)
    fix = "the loss contains its logarithm, so 0 is refused; 1e-3 is usual"
    check_number("label_smoothing", label_smoothing, "in (0, 0.5)", lambda v: 0 < v < 0.5, fix)
    margin = beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    chosen = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing))
    rejected = jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing))
    return chosen + rejected


def discopop(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    tau: Scalar = 0.05,
    divergence: Divergence = reverse_kl,
) -> Float[Array, "B"]:
    """Discovered preference optimisation (log-ratio modulated): logistic loss below margin 0, exponential above.

        loss = (1 - m) (-log sigmoid(x)) + m e^-x        x = beta D        m = sigmoid(x / tau)

    Arguments as in `dpo`. tau: temperature of the switch, in (0, 1]; EasyDeL's default is 1. Result: [B], at least 0;
    (1 + log 2) / 2 where the policy equals the reference. Not convex and not monotone: around margin 0 it rises.

    Numerics: m e^-x is computed as exp(log sigmoid(x / tau) - x), at most 1 for x <= 0; TRL multiplies the two, which
    gives 0 * inf = NaN for x < -88 in float32. A tau above 1 is refused: the product then has no bound.

    Source: Lu et al. 2024, arXiv:2406.08414, equation 5. Otherwise as in TRL's "discopop".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-20.0]), jnp.array([-25.0])), (jnp.array([-21.0]), jnp.array([-24.5]))
    >>> print(f"{discopop(*policy, *reference, beta=0.1)[0]:.6f}")
    0.849338
    """
    check_beta(beta)
    fix = "0.05 is the paper's; above 1 the exponential term grows without bound as the margin falls"
    check_number("tau", tau, "in (0, 1]", lambda v: 0 < v <= 1, fix)
    x = beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    # log sigmoid(x / tau) - x, without the difference of two large numbers
    exponent = jnp.minimum((1 / tau - 1) * x, -x) - jax.nn.softplus(-jnp.abs(x) / tau)
    return jax.nn.sigmoid(-x / tau) * logistic_loss(x) + jnp.exp(exponent)


def _scores(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    divergence: Divergence,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """s(a) and s(b)."""
    check_one_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    chosen = divergence(log_ratio(policy_chosen, reference_chosen))
    return chosen, divergence(log_ratio(policy_rejected, reference_rejected))


def _margin(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    divergence: Divergence,
) -> Float[Array, "B"]:
    """D = s(a) - s(b)."""
    chosen, rejected = _scores(policy_chosen, policy_rejected, reference_chosen, reference_rejected, divergence)
    return chosen - rejected
