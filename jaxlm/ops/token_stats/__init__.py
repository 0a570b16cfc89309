"""The hot path: log-probability, entropy and logsumexp of each token, from hidden states and the unembedding matrix."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp

from jaxlm.ops.platform import platform
from jaxlm.ops.token_stats.contract import (
    Implementation,
    Output,
    TokenStats,
    blank,
    check_outputs,
    check_shapes,
    check_soft_cap,
    check_targets,
    check_temperature,
    silence,
)
from jaxlm.ops.token_stats.dense import dense, from_logits
from jaxlm.ops.token_stats.head import Head
from jaxlm.ops.token_stats.one_pass import one_pass_nll
from jaxlm.ops.token_stats.sharded import token_stats_sharded
from jaxlm.ops.token_stats.tiled import tiled
from jaxlm.typing import Array, Bool, Float, Int

__all__ = [
    "IMPLEMENTATIONS",
    "TokenStats",
    "one_pass_nll",
    "token_stats",
    "token_stats_from_logits",
    "token_stats_sharded",
]

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "dense": dense,
    "tiled": tiled,
    "pallas_tpu": partial(tiled, kernel="pallas_tpu"),
    "mosaic_gpu": partial(tiled, kernel="mosaic_gpu"),
}
"""Every implementation by name; all give the same numbers."""


def token_stats(
    hidden: Float[Array, "*tokens D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    bias: Float[Array, "V"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    soft_cap: float | None = None,
    outputs: Collection[Output] = ("logprob", "entropy"),
    implementation: str | None = None,
) -> TokenStats:
    """Log-probability of each target and entropy of its distribution, without ever holding [tokens, vocab].

        u = unembed @ hidden + bias    z = soft_cap * tanh(u / soft_cap) / temperature    p = softmax(z)
        logprob = log p[target]        entropy = -sum_v p_v log p_v                       logsumexp = log sum_v exp z_v

    hidden: [..., D], any float dtype; the products run in it. unembed: [V, D] (rounded to the dtype of hidden, block by
    block). targets: [...] integers in [0, V). mask: [...] boolean, True keeps (None: all). bias: [V]; -inf forbids an
    entry. temperature: a scalar above 0. soft_cap: a number above 0, or None. outputs: any of "logprob", "entropy",
    "logsumexp". implementation: "tiled", "dense", "pallas_tpu" (a kernel for the forward pass on TPUs, interpreted
    elsewhere; no bias, no float64), "mosaic_gpu" (one for Hopper GPUs, bfloat16, no bias, no soft-cap), or None for the
    best one for this platform and these arguments.

    Result: `TokenStats(logprob, entropy, logsumexp)`, each [...] in nats, float32; None where not asked for, and free.
    logprob <= 0 and entropy >= 0 exactly. Differentiable in hidden, unembed and bias through all three outputs, not in
    temperature (stop_gradient).

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
    check_shapes(hidden, unembed, targets, mask=mask, bias=bias)
    run = _implementation(implementation or _best(platform(), Head(hidden, unembed, bias, None), soft_cap))
    stats = run(
        blank(hidden, mask).reshape(-1, hidden.shape[-1]),
        unembed,
        targets.reshape(-1),
        mask=None if mask is None else mask.reshape(-1),
        bias=bias,
        temperature=check_temperature(temperature),
        soft_cap=check_soft_cap(soft_cap),
        outputs=check_outputs(outputs),
    )
    return silence(jax.tree.map(lambda x: x.reshape(targets.shape), stats), mask)


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
    check_targets(logits.shape[:-1], targets, mask=mask)
    wide = blank(logits, mask).astype(jnp.promote_types(logits.dtype, jnp.float32))
    stats = from_logits(
        wide.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        temperature=check_temperature(temperature),
        outputs=check_outputs(outputs),
    )
    return silence(jax.tree.map(lambda x: x.reshape(targets.shape), stats), mask)


def _implementation(name: str) -> Implementation:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, or None, found {name!r}")
    return IMPLEMENTATIONS[name]


def _best(platform_name: str, head: Head, soft_cap: float | None) -> str:
    """The kernel on one Hopper GPU where it can be had, else `tiled`: BENCHMARKS.md; each logged once."""
    if platform_name != "gpu" or not _one_hopper():
        return _announced(platform_name, "tiled")
    from jaxlm.ops.token_stats import mosaic_gpu  # importing it costs more than all else of this package

    return _announced(platform_name, "tiled" if mosaic_gpu.obstacle(head, soft_cap) else "mosaic_gpu")


def _one_hopper() -> bool:
    """A kernel is not split over a mesh: with several devices XLA would gather its operands onto each."""
    devices = jax.devices()
    return len(devices) == 1 and str(getattr(devices[0], "compute_capability", "")) == "9.0"


@cache
def _announced(platform_name: str, name: str) -> str:
    logging.getLogger(__name__).info("token_stats on %s: implementation %r", platform_name, name)
    return name
