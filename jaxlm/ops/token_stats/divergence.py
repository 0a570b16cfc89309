"""KL divergence between the next-token distributions of two heads, a block of the vocabulary at a time.

Forward, one online pass over both. State per token: the running maxima m, n of the logits z, y of p and q, the sums
l = sum e, k = sum exp(y - n) with e = exp(z - m), and c = sum e ((z - m) - (y - n)). Maxima that rise by a and b give

    l' = exp(-a) l + sum e      k' = exp(-b) k + sum exp(y - n)      c' = exp(-a) (c + (b - a) l) + sum e (...)

    KL(p || q) = c / l - log l + log k

Backward recomputes both logits; with the cotangent g:

    dz = g p (log p - log q - KL)        dy = g (q - p)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.token_stats.contract import blank, check_mask, check_options
from jaxlm.ops.token_stats.head import Head, activate, product, project, times_log, unembed_rows, wide_dtype
from jaxlm.ops.token_stats.tiled import default_block, over_vocabulary
from jaxlm.typing import Array, Bool, Float


class _Plan(NamedTuple):
    """What is fixed at trace time: the soft-caps of both heads, and the entries of a block."""

    soft_caps: tuple[float | None, float | None]
    block: int


class _Sums(NamedTuple):
    """The running state of each token: of p, of q, and of both."""

    maxima: tuple[Float[Array, "N"], Float[Array, "N"]]
    exps: tuple[Float[Array, "N"], Float[Array, "N"]]
    both: Float[Array, "N"]


def token_kl(
    p: Mapping[str, Any], q: Mapping[str, Any], *, mask: Bool[Array, "*tokens"] | None = None
) -> Float[Array, "*tokens"]:
    """KL(p || q) of the next-token distributions of two heads, without the logits of either.

        KL(p || q) = sum_v p_v (log p_v - log q_v)

    p, q: each dict(hidden=[..., D], unembed=[V, D]), and of bias, temperature, soft_cap, logit_scale and valid_vocab
    what the head has, with the meaning of `token_stats`. The widths D may differ, the tokens and V may not. mask: [...]
    boolean, True keeps (None: all).

    Result: [...] in nats, at least 0, float32 (float64 for float64 operands under x64); exactly 0 with a zero gradient
    where masked; inf where p has a chance of what q's bias forbids. Differentiable in hidden, unembed and bias of both,
    in reverse mode to any order; what stands under `jax.lax.stop_gradient`, as a teacher or a reference does, costs its
    logits and nothing more once compiled. Masked tokens are computed like the others. On a mesh tokens may be split,
    the vocabulary not.

    >>> import jax.numpy as jnp
    >>> head = dict(hidden=jnp.ones((1, 2)), unembed=jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    >>> print(token_kl(head, head), token_kl(head, head | {"temperature": 2.0}).round(4))
    [0.] [0.0263]
    """
    heads = [_head(x) for x in (p, q)]
    (a, cap_a), (b, cap_b) = heads
    tokens = a.hidden.shape[:-1]
    if b.hidden.shape[:-1] != tokens or a.unembed.shape[0] != b.unembed.shape[0]:
        raise ValueError(
            f"expected the same tokens and as many entries in both heads, found hidden {a.hidden.shape} and "
            f"{b.hidden.shape}, unembed {a.unembed.shape} and {b.unembed.shape}"
        )
    check_mask(tokens, mask)
    flat = [x._replace(hidden=blank(x.hidden, mask).reshape(-1, x.hidden.shape[-1])) for x in (a, b)]
    width = max(x.hidden.shape[1] for x in flat)
    block = min(default_block(2 * len(flat[0].hidden), width), a.unembed.shape[0])
    found = _kl(_Plan((cap_a, cap_b), block), (flat[0], flat[1])).reshape(tokens)
    return found if mask is None else jnp.where(mask, found, 0)


def _head(given: Mapping[str, Any]) -> tuple[Head, float | None]:
    options: dict[str, Any] = dict(bias=None, temperature=1.0, soft_cap=None, logit_scale=1.0, valid_vocab=None)
    unknown = sorted(set(given) - {"hidden", "unembed", *options})
    if unknown or not {"hidden", "unembed"} <= set(given):
        raise ValueError(
            f"a head: expected hidden, unembed and of {', '.join(options)} what it has; found {', '.join(given)}"
        )
    hidden, unembed = given["hidden"], given["unembed"]
    if unembed.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != unembed.shape[1]:
        raise ValueError(f"a head: expected hidden [..., D], unembed [V, D], found {hidden.shape} and {unembed.shape}")
    found = check_options(unembed, **{name: given.get(name, default) for name, default in options.items()})
    return Head(hidden, unembed, found.bias, found.temperature), found.soft_cap


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(plan: _Plan, heads: tuple[Head, Head]) -> Float[Array, "N"]:
    return _kl_fwd(plan, heads)[0]


def _kl_fwd(plan: _Plan, heads: tuple[Head, Head]) -> tuple[Array, Any]:
    dtype = jnp.promote_types(*map(wide_dtype, heads))
    zeros = jnp.zeros(heads[0].hidden.shape[0], dtype)
    lowest = zeros + jnp.finfo(dtype).min
    start = _Sums((lowest, lowest), (zeros, zeros), zeros)
    sums = over_vocabulary(partial(_accumulate, plan, heads), start, heads[0].unembed.shape[0], plan.block)
    logs = tuple(jnp.log(jnp.where(x < 1, 1, x)) for x in sums.exps)
    kl = sums.both / jnp.where(sums.exps[0] < 1, 1, sums.exps[0]) - logs[0] + logs[1]
    kl = jnp.where(kl < 0, 0, kl)
    return kl, (heads, sums.maxima, logs, kl)


def _logits(plan: _Plan, heads: tuple[Head, Head], start: Array | int, width: int) -> list[tuple[Array, Any, Array]]:
    """Of each head: its block of logits, what pulls a gradient back to its products, and its rows of unembed."""
    found = []
    for head, soft_cap in zip(heads, plan.soft_caps):
        z, pull = jax.vjp(partial(activate, head=head, soft_cap=soft_cap), project(head, start, width))
        found.append((z, pull, unembed_rows(head, start, width)))
    return found


def _accumulate(plan: _Plan, heads: tuple[Head, Head], sums: _Sums, start: Array | int, width: int) -> _Sums:
    logits = [z for z, _, _ in _logits(plan, heads, start, width)]
    maxima, below, falls = [], [], []
    for z, before, total in zip(logits, sums.maxima, sums.exps):
        maximum = jax.lax.stop_gradient(jnp.maximum(before, z.max(axis=1)))  # no result depends on it
        maxima.append(maximum)
        below.append(z - maximum[:, None])
        falls.append(jnp.where(total > 0, before - maximum, 0))
    e, f = map(jnp.exp, below)
    (fall, other), (total, total_q) = falls, sums.exps
    both = jnp.exp(fall) * (sums.both + (fall - other) * total)
    exps = jnp.exp(fall) * total + e.sum(axis=1), jnp.exp(other) * total_q + f.sum(axis=1)
    return _Sums((maxima[0], maxima[1]), exps, both + times_log(e, below[0] - below[1]).sum(axis=1))


def _kl_bwd(plan: _Plan, residuals: Any, g: Float[Array, "N"]) -> tuple[tuple[Head, Head]]:
    heads, maxima, logs, kl = residuals
    start = tuple(
        Head(
            hidden=jnp.zeros(head.hidden.shape, wide_dtype(head)),
            unembed=jnp.zeros_like(head.unembed),
            bias=None if head.bias is None else jnp.zeros_like(head.bias),
            temperature=None,
        )
        for head in heads
    )

    def step(grads: tuple[Head, Head], start: Array | int, width: int) -> tuple[Head, Head]:
        found = _logits(plan, heads, start, width)
        log_p, log_q = (z - m[:, None] - log[:, None] for (z, _, _), m, log in zip(found, maxima, logs))
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        dz = g[:, None] * times_log(p, log_p - log_q - kl[:, None]), g[:, None] * (q - p)
        new = [
            _add(grad, head, pull(d.astype(z.dtype))[0], rows, start)
            for grad, head, (z, pull, rows), d in zip(grads, heads, found, dz)
        ]
        return new[0], new[1]

    grads = over_vocabulary(step, start, heads[0].unembed.shape[0], plan.block)
    return (
        tuple(
            grad._replace(
                hidden=grad.hidden.astype(head.hidden.dtype),
                temperature=None if head.temperature is None else jnp.zeros_like(head.temperature),
            )
            for grad, head in zip(grads, heads)
        ),
    )


_kl.defvjp(_kl_fwd, _kl_bwd)


def _add(grad: Head, head: Head, du: Float[Array, "N C"], rows: Float[Array, "C D"], start: Array | int) -> Head:
    """The gradients of a head with those of a block: added for hidden, written for unembed and bias."""
    narrow = du.astype(head.hidden.dtype)

    def write(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=0)

    return grad._replace(
        hidden=grad.hidden + product(head, narrow, rows, ((1,), (0,))),
        unembed=write(grad.unembed, product(head, narrow, head.hidden, ((0,), (0,)))),
        bias=None if grad.bias is None else write(grad.bias, du.sum(axis=0)),
    )
