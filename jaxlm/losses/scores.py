"""What preference losses are made of: log-ratios, f-divergence maps, means per token, checks of hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Float, Int

Scalar = float | Float[Array, ""]
"""A hyper-parameter: a number, which is checked, or an array, perhaps traced, which is not."""

Length = Int[Array, "B"] | Float[Array, "B"]
"""Completion tokens of each response, at least 0."""

Divergence = Callable[[Float[Array, "..."]], Float[Array, "..."]]
"""A map s(u) of the log-ratio u = log pi/pi_ref: increasing, s(0) = 0, the derivative f' of the f-divergence at e^u."""

MAX_EXPONENT = 30.0
"""Where `bounded_expm1` leaves the exponential: e^30 = 1.1e13, whose squares and multiples still fit float32."""


def wide(x: Array) -> Float[Array, "..."]:
    """The same values in float32, or in their own type where that is wider.

    >>> import jax.numpy as jnp
    >>> wide(jnp.ones(2, jnp.bfloat16)).dtype, wide(jnp.array([1, 2])).dtype
    (dtype('float32'), dtype('float32'))
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_ratio(policy: Float[Array, "B"], reference: Float[Array, "B"]) -> Float[Array, "B"]:
    """How much likelier the policy makes each response than the reference does.

        u = log pi(y) - log pi_ref(y)

    policy, reference: [B] summed log-probabilities, nats, at most 0. Result: [B] nats, float32 or wider (widened
    before the subtraction, which cancels most digits).

    >>> import jax.numpy as jnp
    >>> log_ratio(jnp.array([-20.0]), jnp.array([-21.0])).tolist()
    [1.0]
    """
    check_one_shape(policy=policy, reference=reference)
    return wide(policy) - wide(reference)


def per_token(total: Float[Array, "B"], length: Length) -> Float[Array, "B"]:
    """Mean over the tokens of each response, from their sum.

        total / max(length, 1)

    total: [B] summed over the completion. length: [B] its tokens, at least 0. Result: [B]; 0 for an empty completion,
    whose sum is 0.

    >>> import jax.numpy as jnp
    >>> per_token(jnp.array([-20.0, 0.0]), jnp.array([8, 0])).tolist()
    [-2.5, 0.0]
    """
    check_one_shape(total=total, length=length)
    return wide(total) / jnp.maximum(wide(length), 1)


def logistic_loss(margin: Float[Array, "B"]) -> Float[Array, "B"]:
    """Cross-entropy of a Bradley-Terry preference that is certain.

        loss = -log sigmoid(margin) = log(1 + e^-margin)

    margin: [B], any real. Result: [B] nats, at least 0, linear in a very negative margin: never infinite.

    >>> import jax.numpy as jnp
    >>> print([f"{v:.4f}" for v in logistic_loss(jnp.array([-1e4, 0.0, 1e4]))])
    ['10000.0000', '0.6931', '0.0000']
    """
    return jax.nn.softplus(-margin)


def smoothed_logistic_loss(margin: Float[Array, "B"], label_smoothing: Scalar) -> Float[Array, "B"]:
    """Cross-entropy of a Bradley-Terry preference that holds with probability 1 - label_smoothing.

        loss = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)        e = label_smoothing

    margin: [B], any real. label_smoothing: in [0, 0.5). Result: [B] nats, at least the entropy of e.

    >>> import jax.numpy as jnp
    >>> print(f"{smoothed_logistic_loss(jnp.array([0.15]), 0.1)[0]:.6f}")
    0.635957
    """
    check_label_smoothing(label_smoothing)
    return (1 - label_smoothing) * logistic_loss(margin) + label_smoothing * logistic_loss(-margin)


def bounded_expm1(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """e^x - 1, continued past x = 30 by its tangent, so that neither value nor gradient overflows float32.

        e^x - 1                          x <= 30
        e^30 - 1 + e^30 (x - 30)         x > 30

    A clamp, the usual remedy, makes the gradient 0 exactly where the argument is worst; a tangent keeps it at e^30.

    >>> import jax, jax.numpy as jnp
    >>> print([f"{v:.3g}" for v in bounded_expm1(jnp.array([1e-6, 1.0, 1e4]))], f"{jax.grad(bounded_expm1)(1e4):.3g}")
    ['1e-06', '1.72', '1.07e+17'] 1.07e+13
    """
    low = jnp.minimum(x, MAX_EXPONENT)
    return jnp.expm1(low) + jnp.exp(low) * (x - low)


def reverse_kl(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """The map of KL(pi || pi_ref), which is standard DPO: the log-ratio itself.

        s(u) = u

    Source: Wang et al. 2023 (Beyond Reverse KL), arXiv:2309.16240, as the other maps here.

    >>> import jax.numpy as jnp
    >>> reverse_kl(jnp.array([1.0, -0.5])).tolist()
    [1.0, -0.5]
    """
    return log_ratio


def forward_kl(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """The map of KL(pi_ref || pi): punishes falling below the reference ever harder.

        s(u) = 1 - e^-u

    Numerics: below u = -30 the exponential goes on as its tangent (`bounded_expm1`), so the score stays monotone and
    finite. TRL leaves it unbounded (infinite in float32 below u = -88, then NaN), and is equal above -30.

    >>> import jax.numpy as jnp
    >>> forward_kl(jnp.array([1.0, -0.5])).round(4).tolist()
    [0.632..., -0.648...]
    """
    return -bounded_expm1(-log_ratio)


def js_divergence(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """The map of the Jensen-Shannon divergence (twice its usual scale, as in the paper): rises by log 2 at most.

        s(u) = log 2 + log sigmoid(u)

    >>> import jax.numpy as jnp
    >>> js_divergence(jnp.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.379...]
    """
    return math.log(2) + jax.nn.log_sigmoid(log_ratio)


def alpha_divergence(log_ratio: Float[Array, "..."], *, alpha: float) -> Float[Array, "..."]:
    """The map of the alpha-divergences, which run from forward KL (alpha 0) to reverse KL (alpha 1) and beyond.

        s(u) = (e^((alpha - 1) u) - 1) / (alpha - 1)        u where alpha = 1

    alpha: any finite number. Pass it as `divergence=functools.partial(alpha_divergence, alpha=0.5)`.
    Numerics: past an exponent of 30 the exponential goes on as its tangent (`bounded_expm1`); TRL clamps it at 80 (11
    in float16), where the gradient becomes 0.

    >>> import jax.numpy as jnp
    >>> alpha_divergence(jnp.array([1.0, -0.5]), alpha=0.5).round(4).tolist()
    [0.786..., -0.568...]
    """
    check_number("alpha", alpha, "to be finite", math.isfinite, "0 is forward KL, 1 reverse KL, 0.5 between them")
    return log_ratio if alpha == 1 else bounded_expm1((alpha - 1) * log_ratio) / (alpha - 1)


def check_number(name: str, value: Scalar, expected: str, holds: Callable[[float], bool], fix: str) -> None:
    """Raises a ValueError that names what was expected, what was found and the way out, unless the number holds.

    value: a number; an array, which may be traced and so have no value yet, passes unchecked.

    >>> check_number("tau", 2.0, "in (0, 1]", lambda v: 0 < v <= 1, "0.05 is the paper's")
    Traceback (most recent call last):
    ValueError: expected tau in (0, 1], found 2.0; 0.05 is the paper's
    """
    if isinstance(value, Real) and not holds(value):
        raise ValueError(f"expected {name} {expected}, found {value}; {fix}")


def check_beta(beta: Scalar) -> None:
    """Raises unless beta, the strength of the pull to the reference, is positive and finite.

    >>> check_beta(0.1)
    """
    fix = "0.1 is usual for summed log-probabilities, 2 to 10 for means per token"
    check_number("beta", beta, "positive and finite", lambda v: 0 < v < math.inf, fix)


def check_label_smoothing(label_smoothing: Scalar) -> None:
    """Raises unless the rate of wrong labels lies in [0, 0.5).

    >>> check_label_smoothing(0.1)
    """
    fix = "it is the share of pairs whose labels are swapped; from 0.5 up, swap chosen and rejected instead"
    check_number("label_smoothing", label_smoothing, "in [0, 0.5)", lambda v: 0 <= v < 0.5, fix)


def check_one_shape(**arrays: Array) -> None:
    """Raises unless the arrays have one shape: [B] beside [B, 1] would silently become [B, B].

    >>> import jax.numpy as jnp
    >>> check_one_shape(policy=jnp.zeros(3), reference=jnp.zeros(3))
    """
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"expected one value per response, all of one shape, found {shapes}; sum each response's token "
            "log-probabilities first (jaxlm.losses.seq_logprob)"
        )
