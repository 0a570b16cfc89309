"""DID entropy of language models: exact per token, estimated per sequence with a floor below which it is refused.

For finite response sets, and for what a DID is: `did.py`. Letters: T, D and V as everywhere, E the reference's width,
K responses drawn from the policy for one prompt. Log-probabilities and entropies in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.analysis.did import entropy, expectation
from jaxlm.ops.token_stats import token_stats
from jaxlm.typing import Bool, Float, Key


def token_did_entropy(
    policy_hidden: Float[Array, "*tokens D"],
    policy_unembed: Float[Array, "V D"],
    reference_hidden: Float[Array, "*tokens E"],
    reference_unembed: Float[Array, "V E"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*tokens"]:
    """DID entropy of each position's next-token distributions, exactly, without ever holding [tokens, vocab].

        H_t = entropy(softmax(z - z')),    z = policy_unembed @ policy_hidden_t,    z' likewise of the reference

    policy_hidden: [..., D]; policy_unembed: [V, D]; the reference's may have another width E. mask: [...] boolean, True
    keeps. implementation: as in `jaxlm.ops.token_stats`. Result: [...] nats, in [0, log V]; 0 where masked.

    Numerics: as in `token_stats`, of the one matrix product [unembed, -reference_unembed] @ [hidden, reference_hidden]
    (normalisers cancel in the DID). A model with a soft-cap is not linear here: use `did_entropy` on its logits.
    The stable companion of `sequence_did_entropy`; the DID of a sequence is not the product of these, because what
    follows a token weighs on its normaliser. Derived.

    >>> import jax.numpy as jnp
    >>> hidden, unembed = jnp.ones((2, 3)), jnp.arange(12.0).reshape(4, 3)
    >>> print(token_did_entropy(hidden, unembed, hidden, unembed).round(3))  # log 4
    [1.386 1.386]
    """
    hidden = jnp.concatenate([policy_hidden, reference_hidden], axis=-1)
    unembed = jnp.concatenate([policy_unembed, -reference_unembed], axis=-1)
    targets = jnp.zeros(hidden.shape[:-1], jnp.int32)  # the entropy does not look at them
    stats = token_stats(hidden, unembed, targets, mask=mask, outputs=("entropy",), implementation=implementation)
    return stats.entropy


def estimate_did_entropy(
    policy_seq_logprob: Float[Array, "*sets K"], reference_seq_logprob: Float[Array, "*sets K"]
) -> tuple[Float[Array, "*sets"], Float[Array, "*sets"]]:
    """Importance-sampling estimate of the sequence DID entropy, with its effective sample size.

        H = -sum_i w_i R_i + log (1/K) sum_i 1/reference(y_i)        ESS = 1 / sum_i w_i^2
        w_i ∝ 1/reference(y_i),  sum_i w_i = 1        R_i = log policy(y_i) - log reference(y_i)

    Both arguments: [..., K] summed log-probabilities of K responses drawn from the policy, nats. Result: (H, ESS),
    each [...]; ESS in [1, K]. Numerics: log space throughout. On long responses a few samples carry it, the ESS is low
    and the estimate biased, downward as a rule: prefer `sequence_did_entropy`, which refuses there.

    Source: that importance weighting with K = 32 is used, reviews of arXiv:2505.23761; the formula is derived.
    """
    log_weight = jax.nn.log_softmax(-reference_seq_logprob, axis=-1)
    mean_log_ratio = expectation(log_weight, policy_seq_logprob - reference_seq_logprob)
    num_samples = policy_seq_logprob.shape[-1]
    log_normalizer = jax.nn.logsumexp(-reference_seq_logprob, axis=-1) - jnp.log(
        jnp.asarray(num_samples, reference_seq_logprob.dtype)
    )
    return log_normalizer - mean_log_ratio, jnp.exp(-jax.nn.logsumexp(2 * log_weight, axis=-1))


def bootstrap_did_entropy(
    policy_seq_logprob: Float[Array, "K"],
    reference_seq_logprob: Float[Array, "K"],
    *,
    key: Key[Array, ""],
    num_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Percentile bootstrap interval of `estimate_did_entropy`: (low, high), at the given level in (0, 1).

    It covers the spread of the estimate, not its downward bias: at a low effective sample size it misses the truth.
    """
    num_samples = policy_seq_logprob.shape[0]
    draws = jax.random.randint(key, (num_resamples, num_samples), 0, num_samples)
    values, _ = estimate_did_entropy(policy_seq_logprob[draws], reference_seq_logprob[draws])
    low, high = jnp.quantile(values, jnp.array([0.5 - level / 2, 0.5 + level / 2]))
    return low, high


class SequenceDidEntropy(NamedTuple):
    """entropy: the estimate, nats; low, high: its bootstrap interval; ess: effective sample size; all floats."""

    entropy: float
    low: float
    high: float
    ess: float


def sequence_did_entropy(
    policy_seq_logprob: Float[Array, "K"],
    reference_seq_logprob: Float[Array, "K"],
    *,
    key: Key[Array, ""],
    min_ess: float = 10.0,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> SequenceDidEntropy:
    """Estimated sequence DID entropy with bootstrap interval and effective sample size, or a refusal.

    policy_seq_logprob, reference_seq_logprob: [K] summed log-probabilities of K responses drawn from the policy, nats.
    min_ess: the floor; the estimate of long responses is carried by a few samples and biased low. num_resamples, level:
    of the interval. Result: `SequenceDidEntropy`. Raises ValueError below the floor. Not for use inside `jax.jit`.

    Formula and source: `estimate_did_entropy`.
    """
    value, ess = (float(x) for x in estimate_did_entropy(policy_seq_logprob, reference_seq_logprob))
    if not ess >= min_ess:
        raise ValueError(
            f"sequence DID entropy: expected an effective sample size of at least min_ess={min_ess:g}, found {ess:.2f} "
            f"of {policy_seq_logprob.shape[0]} samples: draw more or shorter responses, or use token_did_entropy"
        )
    low, high = bootstrap_did_entropy(
        policy_seq_logprob, reference_seq_logprob, key=key, num_resamples=num_resamples, level=level
    )
    return SequenceDidEntropy(value, float(low), float(high), ess)


@jax.jit
def tree_did_entropy(
    policy_steps: Sequence[Float[Array, "prefixes V"]], reference_steps: Sequence[Float[Array, "prefixes V"]]
) -> Float[Array, ""]:
    """Exact DID entropy of all V^T sequences of a tiny vocabulary, by recursion over their tree.

        Z(x) = sum_v r(v | x) Z(xv)                        q(v | x) = r(v | x) Z(xv) / Z(x)
        H(x) = entropy(q(. | x)) + sum_v q(v | x) H(xv)

    with r = policy/reference, x a prefix, and Z = 1, H = 0 for a whole sequence.

    policy_steps, reference_steps: T arrays, the t-th (from 0) of shape [V^t, V]: next-token log-probabilities after
    each prefix, prefixes counted in base V with the first token leading. Result: a scalar, nats, in [0, T log V].

    Derived.
    """
    below = len(policy_steps)
    vocab = policy_steps[-1].shape[-1]
    log_z = jnp.zeros(vocab**below, policy_steps[-1].dtype)
    total = jnp.zeros_like(log_z)
    for policy, reference in zip(reversed(policy_steps), reversed(reference_steps)):
        scores = policy - reference + log_z.reshape(-1, vocab)
        log_q = jax.nn.log_softmax(scores, axis=-1)
        total = entropy(log_q) + expectation(log_q, total.reshape(-1, vocab))
        log_z = jax.nn.logsumexp(scores, axis=-1)
    return total[0]
