"""Differential information between two policies on a finite response set: all of it exact.

The differential information distribution (DID) from a reference to a policy is q(y) ∝ policy(y) / reference(y): the
belief about y, from a uniform prior, that turns the reference into the policy by Bayes' rule. A DID of high entropy
changes every response alike, one of low entropy singles a few out.

Letters: Y responses of a finite set (one prompt), N pairs. Arrays hold log-probabilities in nats with the responses on
the last axis, and results have the dtype of the arguments (float32, or float64 under `jax.enable_x64`). Policies have
full support, except where a function says that it takes -inf. Entropies of tokens and sequences: `did_entropy.py`.

Source: Won et al. 2025, arXiv:2505.23761, as far as its abstracts and reviews state it; what is not theirs is marked
"derived".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Bool, Float


def did(log_policy: Float[Array, "*sets Y"], log_reference: Float[Array, "*sets Y"]) -> Float[Array, "*sets Y"]:
    """Differential information distribution from a reference to a policy, as log-probabilities.

        q(y) = (policy(y) / reference(y)) / sum_y' (policy(y') / reference(y'))

    Both arguments: [..., Y]; a constant added to either (unnormalised logits) changes nothing. Result: [..., Y].

    Source: arXiv:2505.23761, Theorem 3.2 of version 1.

    >>> import jax.numpy as jnp
    >>> print(jnp.exp(did(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.2, 0.8])))).round(3))
    [0.8 0.2]
    """
    return jax.nn.log_softmax(log_policy - log_reference, axis=-1)


def did_entropy(log_policy: Float[Array, "*sets Y"], log_reference: Float[Array, "*sets Y"]) -> Float[Array, "*sets"]:
    """Entropy of the DID.

        H = -sum_y q(y) log q(y),    q = did(policy, reference)

    Arguments as in `did`; with a token's two rows of logits [..., V] it is the token-level DID entropy, exactly.
    Result: [...] nats, in [0, log Y]; log Y if and only if the policy is the reference.

    >>> import jax.numpy as jnp
    >>> same = jnp.log(jnp.array([0.1, 0.9]))
    >>> print(did_entropy(same, same).round(4))  # log 2
    0.6931
    """
    return entropy(did(log_policy, log_reference))


def entropy(log_p: Float[Array, "*sets Y"]) -> Float[Array, "*sets"]:
    """Entropy of each distribution: -sum_y p log p, in nats, with 0 log 0 = 0 (-inf is allowed)."""
    return -expectation(log_p, log_p)


def kl(log_p: Float[Array, "*sets Y"], log_q: Float[Array, "*sets Y"]) -> Float[Array, "*sets"]:
    """Kullback-Leibler divergence of each pair of distributions.

        KL(p || q) = sum_y p(y) (log p(y) - log q(y))

    Both arguments: [..., Y]; -inf is allowed, with 0 log 0 = 0. Result: [...] nats, at least 0; inf where q lacks a
    response of p.
    """
    return expectation(log_p, log_p - log_q)


def jsd(log_p: Float[Array, "*sets Y"], log_q: Float[Array, "*sets Y"]) -> Float[Array, "*sets"]:
    """Jensen-Shannon divergence of two distributions.

        JSD(p, q) = KL(p || m) / 2 + KL(q || m) / 2,    m = (p + q) / 2

    Both arguments: [..., Y]; -inf is allowed. Result: [...] nats, in [0, log 2].

    >>> import jax.numpy as jnp
    >>> print(jsd(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))).round(4))  # log 2
    0.6931
    """
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0).astype(log_p.dtype)
    return jnp.maximum(0.5 * (kl(log_p, log_m) + kl(log_q, log_m)), 0)


def expectation(log_p: Float[Array, "*sets Y"], values: Float[Array, "*sets Y"]) -> Float[Array, "*sets"]:
    """Expectation sum_y p(y) values(y); a response of probability 0 adds 0, whatever its value."""
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, values, 0), axis=-1)


def preference_probability(
    log_chosen: Float[Array, "*sets Y"], log_rejected: Float[Array, "*sets Y"]
) -> Float[Array, "*sets Y Y"]:
    """Probability that a, of an unordered pair {a, b}, is the chosen one.

        p(a > b) = sigma(log q(a) - log q(b)),    q = did(chosen, rejected)

    log_chosen, log_rejected: [..., Y], the distributions that the two responses are drawn from, independently. Result:
    [..., Y, Y] with a on the axis before last: the posterior over which source emitted which.

    Source: arXiv:2505.23761; that it is the exact posterior is derived.
    """
    return jax.nn.sigmoid(margins(log_chosen - log_rejected))


def dpo_optimum(
    log_chosen: Float[Array, "*sets Y"],
    log_rejected: Float[Array, "*sets Y"],
    log_reference: Float[Array, "*sets Y"],
    *,
    beta: float,
) -> Float[Array, "*sets Y"]:
    """The policy that DPO reaches on infinitely many pairs, whatever the two distributions are.

        pi ∝ reference * (chosen / rejected)^(1/beta)

    Each argument: [..., Y]; beta above 0. Result: [..., Y] log-probabilities. With chosen = reference it inverts
    `optimal_rejected`. Derived: the Bradley-Terry loss is least where beta log pi/reference = log chosen/rejected + c.
    """
    return tilt(log_reference, log_chosen - log_rejected, 1 / beta)


def optimal_rejected(
    log_target: Float[Array, "*sets Y"], log_reference: Float[Array, "*sets Y"], *, beta: float
) -> Float[Array, "*sets Y"]:
    """The distribution of rejected responses from which DPO, with chosen responses of the reference, learns the target.

        rejected ∝ reference * (reference / target)^beta

    Each argument: [..., Y]; beta above 0. Result: [..., Y] log-probabilities.

    Source: that a closed form exists, abstract of arXiv:2505.23761; the formula is derived from its power law
    (Theorem 3.3 of version 1): did(reference, rejected) ∝ did(target, reference)^beta.

    >>> import jax.numpy as jnp
    >>> target, reference = jnp.log(jnp.array([0.2, 0.8])), jnp.log(jnp.array([0.5, 0.5]))
    >>> rejected = optimal_rejected(target, reference, beta=0.5)
    >>> print(jnp.exp(dpo_optimum(reference, rejected, reference, beta=0.5)).round(3))
    [0.2 0.8]
    """
    return tilt(log_reference, log_target - log_reference, -beta)


def tilt(
    log_reference: Float[Array, "*sets Y"], reward: Float[Array, "*sets Y"], scale: float | Float[Array, "*sets"]
) -> Float[Array, "*sets Y"]:
    """The reference tilted along a reward: one curve that holds every distribution of the theory.

        pi_s ∝ reference * exp(s * reward)

    log_reference, reward: [..., Y] (nats; any finite values). scale: s, a number or [...]. Result: [..., Y]
    log-probabilities.

    With reward = log target/reference: s = 0 is the reference, 1 the target, -beta the optimal rejected distribution,
    and any pair (chosen, rejected) = (pi_s, pi_(s-beta)) satisfies the power law. Derived.
    """
    return jax.nn.log_softmax(log_reference + jnp.asarray(scale, reward.dtype)[..., None] * reward, axis=-1)


def log_partition(
    log_reference: Float[Array, "*sets Y"], reward: Float[Array, "*sets Y"], scale: float | Float[Array, "*sets"]
) -> Float[Array, "*sets"]:
    """Log-normaliser of the curve, Phi(s) = log sum_y reference(y) exp(s reward(y)), which is convex in s.

    Arguments as in `tilt`, with a normalised reference. With reward = log target/reference, Phi(0) = Phi(1) = 0.
    """
    return jax.nn.logsumexp(log_reference + jnp.asarray(scale, reward.dtype)[..., None] * reward, axis=-1)


def tilted_mean(
    log_reference: Float[Array, "*sets Y"], reward: Float[Array, "*sets Y"], scale: float | Float[Array, "*sets"]
) -> Float[Array, "*sets"]:
    """Expected reward along the curve, Phi'(s) = E_(pi_s)[reward], which rises with s. Arguments as in `tilt`.

    With reward = log target/reference it is by how much the expected log-probability of responses drawn from pi_s
    changes in training from the reference to the target: the displacement that is to be expected. Derived.
    """
    return expectation(tilt(log_reference, reward, scale), reward)


@jax.jit
def solve_tilt(
    log_reference: Float[Array, "*sets Y"], reward: Float[Array, "*sets Y"], mean: float | Float[Array, "*sets"]
) -> Float[Array, "*sets"]:
    """The s at which the tilted reference has a given expected reward.

        s with E_(pi_s)[reward] = mean

    log_reference, reward: [..., Y]; mean: a number or [...], strictly between the extremes of reward. Result: [...]; 0
    where the reward is constant (every s serves). Numerics: 20 doublings of a bracket, 80 bisections; beyond the
    extremes it ends at ±2^20.

    With reward = log target/reference and mean = 0 it is the crossover: responses drawn from pi_s rise in training if
    and only if they lie beyond it. Derived.
    """
    mean = jnp.broadcast_to(jnp.asarray(mean, reward.dtype), reward.shape[:-1])

    def above(s: Float[Array, "*sets"]) -> Bool[Array, "*sets"]:
        return tilted_mean(log_reference, reward, s) >= mean

    one = jnp.ones_like(mean)
    high = jax.lax.fori_loop(0, 20, lambda _, s: jnp.where(above(s), s, 2 * s), one)
    low = jax.lax.fori_loop(0, 20, lambda _, s: jnp.where(above(s), 2 * s, s), -one)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        return jnp.where(above(middle), low, middle), jnp.where(above(middle), middle, high)

    low, high = jax.lax.fori_loop(0, 80, halve, (low, high))
    return jnp.where(jnp.max(reward, axis=-1) > jnp.min(reward, axis=-1), 0.5 * (low + high), 0)


def misalignment(
    log_policy: Float[Array, "*sets Y"], log_reference: Float[Array, "*sets Y"], reward: Float[Array, "*sets Y"]
) -> tuple[Float[Array, "*sets"], Float[Array, "*sets"]]:
    """How far a policy is from the best one of its own expected reward.

        J = KL(policy || pi_g),    pi_g = tilt(reference, reward, g),    E_(pi_g)[reward] = E_policy[reward]

    Each argument: [..., Y]; with a token's rows of logits through log_softmax [..., V] it is the token-level figure.
    Result: (g, J), each [...]; J in nats, at least 0. A constant reward gives g = 0 and J = KL(policy || reference).
    The identity KL(policy || reference) = J + KL(pi_g || reference) splits the distance travelled into waste and use.

    Source: the definition, github.com/yunjae-won/trl-misalignment, with reward = log chosen model / rejected model;
    the identity is derived.
    """
    g = solve_tilt(log_reference, reward, expectation(log_policy, reward))
    return g, kl(log_policy, tilt(log_reference, reward, g))


def expected_change(
    log_source: Float[Array, "*sets Y"], log_before: Float[Array, "*sets Y"], log_after: Float[Array, "*sets Y"]
) -> Float[Array, "*sets"]:
    """Displacement: expected change of the log-probability of responses drawn from a source.

        E_source[log after(y) - log before(y)]

    Each argument: [..., Y]. Result: [...] nats. For source = before it is -KL(before || after), never above 0: the
    log-probabilities of chosen responses that the reference was fitted on must fall (derived).
    """
    return expectation(log_source, log_after - log_before)


def margins(log_p: Float[Array, "*sets Y"]) -> Float[Array, "*sets Y Y"]:
    """Log-margins log p(a) - log p(b) of all pairs, [..., Y, Y] with a on the axis before last."""
    return log_p[..., :, None] - log_p[..., None, :]


def ordered_share(
    target_margin: Float[Array, "N"], reference_margin: Float[Array, "N"], rejected_margin: Float[Array, "N"]
) -> Float[Array, ""]:
    """Share of pairs whose three log-margins are ordered, with the reference in the middle.

        mean_i [ (M_target - M_reference) (M_reference - M_rejected) > 0 ]

    Each argument: [N], log p(chosen) - log p(rejected) under one policy, nats. Result: in [0, 1]. The power law orders
    every pair; three independent policies order 1/3 of them.

    Source: the name "log-margin ordered policies", abstract of arXiv:2505.23761; the statement is derived.
    """
    products = (target_margin - reference_margin) * (reference_margin - rejected_margin)
    return jnp.mean(products > 0, dtype=products.dtype)


class PowerLaw(NamedTuple):
    """slope estimates beta; r2 in (-inf, 1] says how well the power law holds; both scalars."""

    slope: Float[Array, ""]
    r2: Float[Array, ""]


def power_law(evidence: Float[Array, "N"], reward: Float[Array, "N"]) -> PowerLaw:
    """Least-squares test of the power law on pairs: evidence = beta * reward.

        slope = sum_i e_i r_i / sum_i r_i^2        R^2 = 1 - sum_i (e_i - slope r_i)^2 / sum_i e_i^2

    evidence: [N], by how much log chosen model/rejected model differs between the two responses of a pair. reward: [N],
    the same difference of log policy/reference. Result: `PowerLaw(slope, r2)`; NaN if all rewards, or all
    evidence, are 0.

    Derived. There is no intercept, and R^2 is not centred: both sides change sign when a pair is swapped, so that the
    result does not depend on which response of a pair is named first.

    >>> import jax.numpy as jnp
    >>> fit = power_law(jnp.array([0.1, -0.2, 0.3]), jnp.array([1.0, -2.0, 3.0]))
    >>> print(f"{fit.slope:.3f} {fit.r2:.3f}")
    0.100 1.000
    """
    slope = jnp.sum(evidence * reward) / jnp.sum(reward**2)
    return PowerLaw(slope, 1 - jnp.sum((evidence - slope * reward) ** 2) / jnp.sum(evidence**2))
