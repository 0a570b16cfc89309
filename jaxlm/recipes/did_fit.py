"""Finite preference problems, and an objective minimised on them: exactly, on a stream of pairs, on a fixed set.

The objectives are the library's own losses; only how pairs reach them is written here. Letter Y: the responses of the
one prompt. All of it runs in the dtype of the problem; the experiments call it under `jax.enable_x64`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse

from jaxlm import losses
from jaxlm.analysis.did import jsd, optimal_rejected, tilt
from jaxlm.typing import Array, Float, Key

Objective = Callable[[Array, Array, Array, Array], Array]
"""Summed log-probabilities (policy chosen, policy rejected, reference chosen, reference rejected), [B] each, to [B]."""


def _orpo(policy_chosen: Array, policy_rejected: Array, weight: float) -> Array:
    """ORPO on responses that are one token long, so that a mean log-probability is the sum; the SFT term included."""
    one = jnp.ones_like(policy_chosen)
    nll = losses.sft(policy_chosen, chosen_length=one)
    return losses.orpo(
        policy_chosen, policy_rejected, beta=weight, chosen_length=one, rejected_length=one, chosen_nll=nll
    )


OBJECTIVES: Mapping[str, Callable[[float], Objective]] = {
    "dpo": lambda beta: partial(losses.dpo, beta=beta),
    "cpo": lambda beta: lambda w, r, *_: losses.cpo(w, r, beta=beta),
    "hinge": lambda beta: partial(losses.hinge, beta=beta),
    "bco_pair": lambda beta: partial(losses.bco_pair, beta=beta),
    "apo_zero": lambda beta: partial(losses.apo_zero, beta=beta),
    "orpo": lambda _: lambda w, r, *_: _orpo(w, r, 1.0),
    "orpo_weak": lambda _: lambda w, r, *_: _orpo(w, r, 0.1),
    "nca": lambda beta: partial(losses.nca, beta=beta),
    "ipo_sum": lambda beta: partial(losses.ipo_sum, beta=beta),
    "sppo_hard": lambda beta: partial(losses.sppo_hard, beta=beta),
}
"""Name -> beta -> objective. CPO is without its likelihood term; ORPO's weight (1, or 0.1 where weak) is not beta."""

LABELS = {
    "dpo": "DPO", "cpo": "CPO (no reference)", "hinge": "hinge", "bco_pair": "BCO-pair", "apo_zero": "APO-zero",
    "orpo": "ORPO, weight 1", "orpo_weak": "ORPO, weight 0.1", "nca": "NCA-pair", "ipo_sum": "IPO (summed)",
    "sppo_hard": "SPPO-hard",
}  # fmt: skip
"""How tables and plots name the objectives."""


class Problem(NamedTuple):
    """The distributions of one prompt's responses, [..., Y] log-probabilities each."""

    reference: Float[Array, "*sets Y"]
    target: Float[Array, "*sets Y"]
    chosen: Float[Array, "*sets Y"]
    rejected: Float[Array, "*sets Y"]


def draw_policies(seed: int, *, num_responses: int = 32) -> tuple[Array, Array, Array]:
    """Three independent policies of one seed, log softmax of standard normal logits: reference, target, another."""
    rng = np.random.default_rng(seed)
    reference, target, other = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=num_responses))) for _ in range(3))
    return reference, target, other


def power_law_problem(seed: int, *, beta: float, num_responses: int = 32) -> Problem:
    """Chosen responses of the reference, rejected ones of the distribution from which DPO learns the target."""
    reference, target, _ = draw_policies(seed, num_responses=num_responses)
    return Problem(reference, target, reference, optimal_rejected(target, reference, beta=beta))


def pair_weights(problem: Problem) -> Float[Array, "Y Y"]:
    """Probability of each (chosen, rejected) pair: the population that infinitely many pairs amount to."""
    return jnp.exp(problem.chosen[:, None] + problem.rejected[None, :])


def sampled_weights(problem: Problem, *, num_pairs: int, seed: int) -> Float[Array, "Y Y"]:
    """Frequency of each pair in a fixed set of num_pairs independent draws."""
    weights = np.asarray(pair_weights(problem), np.float64)
    counts = np.random.default_rng(seed).multinomial(num_pairs, (weights / weights.sum()).ravel())
    return jnp.asarray(counts.reshape(weights.shape) / num_pairs)


def population_loss(
    log_policy: Float[Array, "Y"], log_reference: Float[Array, "Y"], weights: Float[Array, "Y Y"], *, loss: Objective
) -> Float[Array, ""]:
    """Expected loss over all pairs, sum_ab weights_ab loss(a chosen, b rejected), exactly."""

    def rows(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], weights.shape).ravel()

    def columns(x: Array) -> Array:
        return jnp.broadcast_to(x[None, :], weights.shape).ravel()

    pairs = loss(rows(log_policy), columns(log_policy), rows(log_reference), columns(log_reference))
    return jnp.sum(weights.ravel() * pairs)


@cache
def _value_and_grad(name: str, beta: float) -> Any:
    def value(logits: Array, log_reference: Array, weights: Array) -> Array:
        return population_loss(jax.nn.log_softmax(logits), log_reference, weights, loss=OBJECTIVES[name](beta))

    return jax.jit(jax.value_and_grad(value))


def minimize(
    name: str,
    problem: Problem,
    *,
    beta: float,
    weights: Float[Array, "Y Y"] | None = None,
    max_steps: int = 5000,
) -> Float[Array, "Y"]:
    """The policy (log-probabilities) that minimises an objective over the pairs, by L-BFGS from the reference.

    name: of OBJECTIVES; weights: of the pairs (None: the population's); max_steps ends the objectives whose minimum
    lies at infinity.
    """
    weights = pair_weights(problem) if weights is None else weights
    value_and_grad = _value_and_grad(name, beta)

    def evaluate(logits: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = value_and_grad(logits, problem.reference, weights)
        return float(value), np.asarray(grad)

    options = dict(maxiter=max_steps, maxfun=2 * max_steps, maxcor=50, ftol=0.0, gtol=1e-12)
    found = scipy.optimize.minimize(
        evaluate, np.asarray(problem.reference), jac=True, method="L-BFGS-B", options=options
    )
    return jax.nn.log_softmax(jnp.asarray(found.x))


def minimize_hinge(problem: Problem, *, beta: float) -> Float[Array, "Y"]:
    """The policy that minimises the hinge objective over the population, exactly: as a linear program.

        min_(r, s) sum_ab weights_ab s_ab    with    s_ab >= 1 - (r_a - r_b),  s >= 0,    pi ∝ reference * exp(r / beta)

    L-BFGS, made for smooth functions, stops short of it, at a policy that differs by up to 0.015 in JSD.
    """
    weights = np.asarray(pair_weights(problem), np.float64)
    num, pairs = len(weights), weights.size
    chosen, rejected = np.indices(weights.shape).reshape(2, -1)
    row = np.arange(pairs)
    entries = np.concatenate([-np.ones(pairs), np.ones(pairs), -np.ones(pairs)])
    places = np.concatenate([row, row, row]), np.concatenate([chosen, rejected, num + row])
    found = scipy.optimize.linprog(
        np.concatenate([np.zeros(num), weights.ravel()]),
        A_ub=scipy.sparse.coo_matrix((entries, places)).tocsr(),
        b_ub=-np.ones(pairs),
        bounds=[(None, None)] * num + [(0, None)] * pairs,
    )
    return tilt(problem.reference, jnp.asarray(found.x[:num]), 1 / beta)


def sample(key: Key[Array, ""], log_p: Float[Array, "Y"], num: int) -> Array:
    """num independent responses (indices) of a distribution, by inversion of its cumulative sum."""
    cumulative = jnp.cumsum(jnp.exp(log_p))
    draws = jax.random.uniform(key, (num,), cumulative.dtype) * cumulative[-1]
    return jnp.minimum(jnp.searchsorted(cumulative, draws, side="right", method="compare_all"), len(log_p) - 1)


@partial(jax.jit, static_argnames=("name", "beta", "num_steps", "num_pairs", "learning_rate"))
def train_on_stream(
    problems: Problem,
    keys: Key[Array, "seeds"],
    *,
    name: str,
    beta: float,
    num_steps: int,
    num_pairs: int = 512,
    learning_rate: float = 0.03,
) -> Float[Array, "seeds steps"]:
    """JSD to the target after each Adam step on fresh pairs, for several problems (stacked on axis 0) at once.

    num_pairs: new pairs per step; learning_rate: of the first step, decaying to 0 along a cosine.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    loss = OBJECTIVES[name](beta)

    def train(problem: Problem, key: Key[Array, ""]) -> Array:
        def mean_loss(logits: Array, chosen: Array, rejected: Array) -> Array:
            policy, reference = jax.nn.log_softmax(logits), problem.reference
            return jnp.mean(loss(policy[chosen], policy[rejected], reference[chosen], reference[rejected]))

        def step(carry: tuple[Array, Any], key: Key[Array, ""]) -> tuple[tuple[Array, Any], Array]:
            logits, state = carry
            key_chosen, key_rejected = jax.random.split(key)
            chosen = sample(key_chosen, problem.chosen, num_pairs)
            rejected = sample(key_rejected, problem.rejected, num_pairs)
            updates, state = optimizer.update(jax.grad(mean_loss)(logits, chosen, rejected), state)
            logits = logits + updates
            return (logits, state), jsd(problem.target, jax.nn.log_softmax(logits))

        start = problem.reference, optimizer.init(problem.reference)
        return jax.lax.scan(step, start, jax.random.split(key, num_steps))[1]

    return jax.vmap(train)(problems, keys)
