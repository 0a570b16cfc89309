"""Preference losses without a reference model; f-divergence maps, which need one, are impossible by signature."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxlm.losses.scores import (
    Length,
    Scalar,
    bounded_expm1,
    check_beta,
    check_number,
    check_one_shape,
    logistic_loss,
    per_token,
    wide,
)
from jaxlm.typing import Array, Float

LEAST_NLL = 2.0**-24
"""Smallest mean nll that ORPO's odds distinguish from a certain response: half the spacing of float32 below 1."""


def sft(policy_chosen: Float[Array, "B"], *, chosen_length: Length) -> Float[Array, "B"]:
    """Mean negative log-likelihood per token of each chosen response: the term that many methods add.

        loss = -policy_chosen / max(n_chosen, 1)

    policy_chosen: [B] summed log-probabilities, nats, at most 0. chosen_length: [B] tokens, at least 0.
    Result: [B] nats per token, at least 0; 0 for an empty completion. Numerics: float32 or wider.

    Deviation: TRL's "sft" is one mean over all chosen tokens of the batch, `-policy_chosen.sum() /
    chosen_length.sum()`; here every response weighs the same, whatever its length.

    >>> import jax.numpy as jnp
    >>> sft(jnp.array([-20.0]), chosen_length=jnp.array([8])).tolist()
    [2.5]
    """
    return 0.0 - per_token(policy_chosen, chosen_length)


def cpo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    chosen_nll: Float[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Contrastive preference optimisation: `dpo` with a uniform reference, held up by the likelihood of the chosen.

        loss = -log sigmoid(beta (l_chosen - l_rejected)) + chosen_nll

    policy_*: [B] summed log-probabilities l of the completions, nats, at most 0. beta: positive. chosen_nll: [B] the
    second term, weighted as wished, for instance `sft(policy_chosen, chosen_length=n)`; None gives the preference term
    alone, which is not the published method.

    Result: [B] nats, at least 0; log 2 (plus chosen_nll) where both are as likely. Numerics: float32 or wider; finite
    with finite gradients for sums of 1e4 nats and more.

    Source: Xu et al. 2024, arXiv:2401.08417, equation 3. TRL's "sigmoid" adds cpo_alpha (1.0) times one mean nll over
    all chosen tokens of the batch, and can smooth labels.

    >>> import jax.numpy as jnp
    >>> chosen, rejected = jnp.array([-20.0]), jnp.array([-25.0])
    >>> print(f"{cpo(chosen, rejected, beta=0.1)[0]:.6f}")
    0.474077
    >>> print(f"{cpo(chosen, rejected, beta=0.1, chosen_nll=sft(chosen, chosen_length=jnp.array([8])))[0]:.6f}")
    2.974077
    """
    check_beta(beta)
    check_one_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    return _plus(logistic_loss(beta * (wide(policy_chosen) - wide(policy_rejected))), chosen_nll)


def simpo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    gamma: Scalar,
    chosen_length: Length,
    rejected_length: Length,
) -> Float[Array, "B"]:
    """Simple preference optimisation: the reward is the mean log-probability per token, and must win by a margin.

        loss = -log sigmoid(beta (m_chosen - m_rejected) - gamma)        m = l / max(n, 1)

    policy_*: as in `cpo`. beta: positive; 2 to 10 is usual. gamma: the margin, at least 0; usual are 0.3 to 1.6 of
    beta. *_length: [B] tokens of the completions, at least 0. Result: [B] nats, at least 0; log(1 + e^gamma) where
    both are as likely per token. Numerics as in `cpo`; an empty completion has m = 0, the largest reward there is, so
    drop such pairs.

    Source: Meng et al. 2024, arXiv:2405.14734, equation 6. As in TRL's "simpo" with cpo_alpha 0, where an empty
    completion gives NaN; adding `sft` gives CPO-SimPO.

    >>> import jax.numpy as jnp
    >>> lengths = {"chosen_length": jnp.array([8]), "rejected_length": jnp.array([5])}
    >>> print(f"{simpo(jnp.array([-20.0]), jnp.array([-25.0]), beta=2.0, gamma=0.5, **lengths)[0]:.6f}")
    0.011048
    """
    check_beta(beta)
    _check_gamma(gamma)
    chosen, rejected = _means(policy_chosen, policy_rejected, chosen_length, rejected_length)
    return logistic_loss(beta * (chosen - rejected) - gamma)


def alphapo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    gamma: Scalar,
    alpha: float,
    chosen_length: Length,
    rejected_length: Length,
) -> Float[Array, "B"]:
    """AlphaPO: `simpo` with the reward bent by alpha, which sets how hard low likelihoods are punished.

        loss = -log sigmoid(beta (r_chosen - r_rejected) - gamma)        r = (1 - e^(-alpha m)) / alpha

    Arguments as in `simpo`. alpha: any finite number; 0 is `simpo`; a positive one punishes unlikely responses
    exponentially, and 0.25 is usual. Result: as in `simpo`. Numerics as in `cpo`; past an exponent of 30 the
    exponential goes on as its tangent (`bounded_expm1`).

    Source: Gupta et al. 2025, arXiv:2501.03884. TRL's "alphapo" is the same up to that exponent, and infinite in
    float32 past 88.

    >>> import jax.numpy as jnp
    >>> chosen, rejected = jnp.array([-20.0]), jnp.array([-25.0])
    >>> lengths = {"chosen_length": jnp.array([8]), "rejected_length": jnp.array([5])}
    >>> print(f"{alphapo(chosen, rejected, beta=0.5, gamma=0.0, alpha=0.25, **lengths)[0]:.4f}")
    0.0383
    """
    check_beta(beta)
    _check_gamma(gamma)
    check_number("alpha", alpha, "to be finite", math.isfinite, "0 is SimPO, 0.25 is usual")
    chosen, rejected = _means(policy_chosen, policy_rejected, chosen_length, rejected_length)
    if alpha != 0:
        chosen, rejected = -bounded_expm1(-alpha * chosen) / alpha, -bounded_expm1(-alpha * rejected) / alpha
    return logistic_loss(beta * (chosen - rejected) - gamma)


def orpo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
    chosen_length: Length,
    rejected_length: Length,
    chosen_nll: Float[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Odds-ratio preference optimisation: fine-tuning on the chosen plus a penalty on the odds of the rejected.

        loss = chosen_nll - beta log sigmoid(logit_chosen - logit_rejected)
        logit = m - log(1 - e^m)        m = l / max(n, 1)

    Arguments as in `simpo`. beta: the paper's lambda, weight of the odds term; 0.1 is usual. chosen_nll: [B] mean nll
    per token of prompt and chosen response; None gives the odds term alone, which is not the published method.

    Result: [B] nats, at least 0; beta log 2 (plus chosen_nll) where both are as likely per token. Numerics: float32 or
    wider, log(1 - e^m) by expm1 or log1p, whichever is exact; m is held at or below -2^-24, past which float32 cannot
    tell the probability from 1: a certain or empty response has logit 16.6 and a zero gradient, where TRL gives NaN.

    Source: Hong et al. 2024, arXiv:2403.07691, equations 4 and 7. TRL computes the odds term in float32 whatever the
    inputs, and its nll is one mean over the tokens of prompt and chosen response in the batch.

    >>> import jax.numpy as jnp
    >>> lengths = {"chosen_length": jnp.array([8]), "rejected_length": jnp.array([5])}
    >>> print(f"{orpo(jnp.array([-20.0]), jnp.array([-25.0]), beta=1.0, **lengths)[0]:.6f}")
    0.073119
    """
    check_beta(beta)
    chosen, rejected = _means(policy_chosen, policy_rejected, chosen_length, rejected_length)
    return _plus(beta * logistic_loss(_logit(chosen) - _logit(rejected)), chosen_nll)


def tpo(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    policy_gold: Float[Array, "B"],
    *,
    beta: Scalar,
    alpha: Scalar,
    gold_length: Length,
) -> Float[Array, "B"]:
    """Triple preference optimisation: a reference-free preference, and fine-tuning on a third, gold response.

        loss = -log sigmoid(beta (l_chosen - l_rejected)) - alpha l_gold / max(n_gold, 1)

    policy_chosen, policy_rejected: as in `cpo`. policy_gold: [B] summed log-probabilities of the gold response.
    beta: positive. alpha: weight of the gold response, at least 0; 1 is usual. gold_length: [B] its tokens, at least 0.
    Result: [B] nats, at least 0. Numerics as in `cpo`.

    Source: Saeidi et al. 2024, arXiv:2405.16681. TRL's "sigmoid" takes one mean nll over all gold tokens of the batch,
    and has hinge and IPO forms: `hinge` and `ipo` with zeros for the reference, plus `sft` on the gold response.

    >>> import jax.numpy as jnp
    >>> chosen, rejected, gold = jnp.array([-20.0]), jnp.array([-25.0]), jnp.array([-12.0])
    >>> print(f"{tpo(chosen, rejected, gold, beta=0.1, alpha=1.0, gold_length=jnp.array([8]))[0]:.6f}")
    1.974077
    """
    _check_alpha(alpha)
    gold_nll = sft(policy_gold, chosen_length=gold_length)
    return cpo(policy_chosen, policy_rejected, beta=beta, chosen_nll=alpha * gold_nll)


def tpo_l(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    policy_gold: Float[Array, "B"],
    *,
    beta: Scalar,
    gamma: Scalar,
    alpha: Scalar,
    chosen_length: Length,
    rejected_length: Length,
    gold_length: Length,
) -> Float[Array, "B"]:
    """Triple preference optimisation, length-normalised: the preference term is `simpo`'s instead of `cpo`'s.

        loss = -log sigmoid(beta (m_chosen - m_rejected) - gamma) - alpha m_gold        m = l / max(n, 1)

    Arguments as in `tpo` and `simpo`. Result: [B] nats, at least 0. Numerics as in `cpo`.

    Source: Saeidi et al. 2024, arXiv:2405.16681. TRL's "tpo-l" takes one mean nll over all gold tokens of the batch.

    >>> import jax.numpy as jnp
    >>> lengths = {"chosen_length": jnp.array([8]), "rejected_length": jnp.array([5]), "gold_length": jnp.array([8])}
    >>> chosen, rejected, gold = jnp.array([-20.0]), jnp.array([-25.0]), jnp.array([-12.0])
    >>> print(f"{tpo_l(chosen, rejected, gold, beta=2.0, gamma=0.5, alpha=1.0, **lengths)[0]:.6f}")
    1.511048
    """
    _check_alpha(alpha)
    lengths = {"chosen_length": chosen_length, "rejected_length": rejected_length}
    preference = simpo(policy_chosen, policy_rejected, beta=beta, gamma=gamma, **lengths)
    return _plus(preference, alpha * sft(policy_gold, chosen_length=gold_length))


def _means(
    policy_chosen: Float[Array, "B"], policy_rejected: Float[Array, "B"], chosen_length: Length, rejected_length: Length
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Mean log-probability per token of both responses."""
    check_one_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    return per_token(policy_chosen, chosen_length), per_token(policy_rejected, rejected_length)


def _logit(mean_logprob: Float[Array, "B"]) -> Float[Array, "B"]:
    """Log-odds log(p / (1 - p)) of p = e^m."""
    mean_logprob = jnp.minimum(mean_logprob, -LEAST_NLL)
    return mean_logprob - jax.nn.log1mexp(-mean_logprob)


def _plus(loss: Float[Array, "B"], nll: Float[Array, "B"] | None) -> Float[Array, "B"]:
    """The two terms, or the one there is."""
    if nll is None:
        return loss
    check_one_shape(loss=loss, chosen_nll=nll)
    return loss + wide(nll)


def _check_gamma(gamma: Scalar) -> None:
    fix = "it is the margin in units of the reward beta * m, beta times what some papers call the gamma ratio"
    check_number("gamma", gamma, "at least 0 and finite", lambda v: 0 <= v < math.inf, fix)


def _check_alpha(alpha: Scalar) -> None:
    fix = "it weighs the nll of the gold response; 1 is usual, 0 leaves it out"
    check_number("alpha", alpha, "at least 0 and finite", lambda v: 0 <= v < math.inf, fix)
