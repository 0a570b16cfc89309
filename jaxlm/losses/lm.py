"""Language-model losses, one value per token or per sequence; the caller (or `jaxlm.ops.masked`) reduces them."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxlm.ops.masked import masked_sum
from jaxlm.ops.token_stats import token_stats
from jaxlm.typing import Array, Bool, Float, Int


def cross_entropy(
    hidden: Float[Array, "*tokens D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    bias: Float[Array, "V"] | None = None,
    soft_cap: float | None = None,
    z_weight: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "*tokens"]:
    """Cross-entropy of each target, from hidden states, without ever holding [tokens, vocab].

        loss = -log softmax(z)[target] + z_weight * (log sum_v exp z_v)^2        z = unembed @ hidden + bias

    hidden: [..., D]. unembed: [V, D]. targets: [...] integers in [0, V). mask: [...] boolean, True keeps. bias: [V].
    soft_cap: z becomes soft_cap * tanh(z / soft_cap). z_weight: at least 0; 1e-4 is usual, 0 is the plain loss at no
    extra cost. implementation: as in `jaxlm.ops.token_stats`.

    Result: [...] float32, nats, at least 0; exactly 0 with a zero gradient where masked. Numerics as in `token_stats`.

    Source: the z term, Chowdhery et al. 2022, arXiv:2204.02311, section 5.

    >>> import jax, jax.numpy as jnp
    >>> def mean_loss(unembed):
    ...     return cross_entropy(jnp.ones((2, 3)), unembed, jnp.array([0, 3])).mean()
    >>> loss, grad = jax.value_and_grad(mean_loss)(jnp.zeros((4, 3)))
    >>> print(loss.round(3), grad[:, 0])
    1.386 [-0.25  0.25  0.25 -0.25]
    """
    stats = token_stats(
        hidden,
        unembed,
        targets,
        mask=mask,
        bias=bias,
        soft_cap=soft_cap,
        outputs=("logprob", "logsumexp") if z_weight else ("logprob",),
        implementation=implementation,
    )
    return next_token_nll(stats.logprob) + (z_loss(stats.logsumexp, weight=z_weight) if z_weight else 0.0)


def next_token_nll(logprob: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Negative log-likelihood of each target.

        nll = -logprob

    logprob: [...] nats, at most 0, as `token_stats` gives it (0 where masked). Result: [...] nats, at least 0.

    >>> import jax.numpy as jnp
    >>> next_token_nll(jnp.array([-2.0, -0.5])).tolist()
    [2.0, 0.5]
    """
    # Not -logprob, whose 0 would carry a minus sign into printed tables.
    return 0.0 - logprob


def z_loss(logsumexp: Float[Array, "*tokens"], *, weight: float = 1e-4) -> Float[Array, "*tokens"]:
    """Penalty that keeps the logits from drifting: it pulls the log-normaliser of each token to 0.

        z_loss = weight * logsumexp^2

    logsumexp: [...] nats, as `token_stats(..., outputs=("logsumexp",))` gives it (0 where masked). weight: at least 0.
    Result: [...], at least 0.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5, which uses weight 1e-4.

    >>> import jax.numpy as jnp
    >>> z_loss(jnp.array([10.0, 0.0]), weight=0.5).tolist()
    [50.0, 0.0]
    """
    return weight * jnp.square(logsumexp)


def seq_logprob(logprob: Float[Array, "B T"], mask: Bool[Array, "B T"] | None = None) -> Float[Array, "B"]:
    """Log-probability of each sequence: what preference losses take.

        seq_logprob = sum_t mask_t logprob_t

    logprob: [B, T] nats, one per token. mask: [B, T] boolean, True keeps (None: all; `token_stats` with a mask has
    already put 0 where it is False). Result: [B] float32, nats; 0 for a row that is masked whole.

    >>> import jax.numpy as jnp
    >>> seq_logprob(jnp.array([[-1.0, -2.0], [-3.0, jnp.nan]]), jnp.array([[True, True], [True, False]])).tolist()
    [-3.0, -3.0]
    """
    return masked_sum(logprob, mask, axis=1)


def bits_per_byte(nll: Float[Array, "..."], num_bytes: Int[Array, "..."] | Float[Array, "..."]) -> Float[Array, "..."]:
    """Compression of a text in bits per byte, which compares models of different tokenizers.

        bits_per_byte = nll / (log 2 * num_bytes)

    nll: total over the tokens of a text, nats. num_bytes: bytes of the same text, at least 1. Result: bits per byte.

    >>> import jax.numpy as jnp
    >>> bits_per_byte(jnp.log(2.0) * 12, jnp.array(4)).tolist()
    3.0
    """
    return nll / (math.log(2) * num_bytes)
