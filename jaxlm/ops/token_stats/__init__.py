"""The hot path: log-probability, entropy and logsumexp of each token, from hidden states and the unembedding matrix."""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp

from jaxlm.ops.platform import devices
from jaxlm.ops.token_stats.contract import (
    Output,
    TokenStats,
    blank,
    check_mask,
    check_options,
    check_outputs,
    check_shapes,
    check_targets,
    check_temperature,
    of_tokens,
    silence,
)
from jaxlm.ops.token_stats.dense import from_logits
from jaxlm.ops.token_stats.dispatch import IMPLEMENTATIONS, best, named
from jaxlm.ops.token_stats.divergence import token_kl
from jaxlm.ops.token_stats.head import Head
from jaxlm.ops.token_stats.one_pass import one_pass_nll
from jaxlm.ops.token_stats.sharded import token_stats_sharded
from jaxlm.typing import Array, Bool, Float, Int

__all__ = [
    "IMPLEMENTATIONS",
    "TokenStats",
    "one_pass_nll",
    "token_kl",
    "token_stats",
    "token_stats_from_logits",
    "token_stats_sharded",
]


def token_stats(
    hidden: Float[Array, "*tokens D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "..."],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    bias: Float[Array, "V"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    outputs: Collection[Output] = ("logprob", "entropy"),
    implementation: str | None = None,
) -> TokenStats:
    """Log-probability of each target and entropy of its distribution, without ever holding [tokens, vocab].

        u = logit_scale * unembed @ hidden + bias    z = soft_cap * tanh(u / soft_cap) / temperature    p = softmax(z)
        logprob = log p[target]                      entropy = -sum_v p_v log p_v
        logsumexp = log sum_v exp z_v                log_sum_squares = log sum_v p_v^2
        argmax = argmax_v p_v                        top_logprob = log p[argmax]

    hidden: [..., D], any float dtype; the products run in it. unembed: [V, D] (rounded to the dtype of hidden, block by
    block). targets: [...] integers in [0, V), or [..., K]: several for each token, as the teacher's likeliest in
    distillation. mask: [...] boolean, True keeps (None: all). bias: [V]; -inf forbids an entry. temperature: a scalar
    above 0. soft_cap: a number above 0, or None. logit_scale: a number above 0. valid_vocab: rows of unembed that are
    entries at all, where the others only fill it up; None: V. outputs: any of those above, each by its name.
    implementation: "tiled", "dense", "pallas_tpu" (a kernel for the forward pass on TPUs, interpreted elsewhere; no
    bias, no float64), "mosaic_gpu" (one for Hopper GPUs, bfloat16, no bias, no soft-cap), or None for the best one for
    this platform and these arguments. The kernels take one target a token and give neither argmax nor log_sum_squares;
    a valid_vocab below V is a bias to them.

    Result: `TokenStats`, each of the shape [...] (logprob: of targets) in nats, float32 (argmax: int32, the first of
    equal ones); None where not asked for, and free. logprob <= 0 and entropy >= 0 exactly. Differentiable in hidden,
    unembed and bias through logprob, entropy and logsumexp; the other three are constants, as temperature is.

    Numerics: products accumulate in float32 and everything after is float32 (float64 for float64 operands under x64);
    the gradient of a float32 unembed is accumulated and returned in float32 even when hidden is bfloat16. A masked
    position gives exactly 0 and a zero gradient whatever stands there, NaN included; a target outside [0, V) that is
    not masked gives logprob -inf. `tiled` and the kernels recompute the logits in the backward pass and support
    reverse mode to any order; forward mode (jvp, jacfwd) needs `dense`. All but `dense` skip masked tokens: they cost
    what the kept ones do. That moves tokens, so on a mesh use `token_stats_sharded`, which does it on each device.

    Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867, Algorithm 3; the fusion with the unembedding,
    Wijmans et al. 2024, arXiv:2411.09009. The entropy's accumulator is shifted by the running maximum, which theirs
    do not have.

    >>> import jax.numpy as jnp
    >>> stats = token_stats(jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.array([0, 3]), mask=jnp.array([True, False]))
    >>> print(stats.logprob.round(3), stats.entropy.round(3), stats.logsumexp)  # log 4 = 1.386
    [-1.386  0.   ] [1.386 0.   ] None
    """
    targets = jnp.asarray(targets)
    check_shapes(hidden, unembed, targets, mask=mask, bias=bias, several=True)
    options = check_options(
        unembed, bias=bias, temperature=temperature, soft_cap=soft_cap, logit_scale=logit_scale, valid_vocab=valid_vocab
    )
    outputs, tokens = check_outputs(outputs), hidden.shape[:-1]
    flat = targets.reshape(-1, *targets.shape[len(tokens) :])
    if implementation is None:
        head = Head(hidden, unembed, options.bias, None)
        implementation = best(head, options.soft_cap, flat, outputs, whole=len(devices()) == 1)
    stats = named(implementation)(
        blank(hidden, mask).reshape(-1, hidden.shape[-1]),
        unembed,
        flat,
        mask=None if mask is None else mask.reshape(-1),
        outputs=outputs,
        **options._asdict(),
    )
    return silence(of_tokens(stats, tokens), mask)


def token_stats_from_logits(
    logits: Float[Array, "*tokens V"],
    targets: Int[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    outputs: Collection[Output] = ("logprob", "entropy"),
) -> TokenStats:
    """The same statistics for those who already hold logits [..., V].

    Arguments, result and numerics as in `token_stats`, with z = logits / temperature; a bias and a soft-cap belong into
    the logits. Logits narrower than float32 are widened first; a logit of -inf forbids an entry.

    >>> import jax.numpy as jnp
    >>> stats = token_stats_from_logits(jnp.zeros((1, 4)), jnp.array([2]), outputs=("logprob", "logsumexp"))
    >>> print(stats.logprob.round(3), stats.entropy, stats.logsumexp.round(3))
    [-1.386] None [1.386]
    """
    targets = jnp.asarray(targets)
    check_targets(logits.shape[:-1], targets)
    check_mask(logits.shape[:-1], mask)
    wide = blank(logits, mask).astype(jnp.promote_types(logits.dtype, jnp.float32))
    stats = from_logits(
        wide.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        temperature=check_temperature(temperature),
        outputs=check_outputs(outputs),
    )
    return silence(of_tokens(stats, targets.shape), mask)
