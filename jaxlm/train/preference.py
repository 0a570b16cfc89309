"""Preference objectives: responses scored segment by segment, a loss on their sums, and the metrics that users watch.

A row of the batch holds whole examples side by side (`jaxlm.data.preference`): of pairs, segment 2j + 1 is the chosen
response of its example j and segment 2j + 2 the rejected one. "slots" is the number of segments that any row may have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.masked import masked_sum
from jaxlm.train.objectives import Score
from jaxlm.train.step import per_step
from jaxlm.typing import Array, Batch, Bool, Float, Int, Key, Metrics, Params

MAX_TILT = 30.0
"""Bound of beta * log-ratio where the predicted displacement takes its exponential."""


class Responses(NamedTuple):
    """What scoring gives for the responses of a batch, one per slot; 0 in an empty slot.

    logprob: summed over the response's tokens, nats. entropy: of the model's predictions there, summed, nats. length:
    tokens, float32.
    """

    logprob: Float[Array, "B slots"]
    entropy: Float[Array, "B slots"]
    length: Float[Array, "B slots"]


Scorer = Callable[[Params, Batch, "Key[Array, 'B'] | None"], Responses]


class Pairs(NamedTuple):
    """The pairs of a batch in one axis: summed log-probabilities (nats) and tokens of both responses.

    reference_*: None where nothing is referred to. present: False in slots that hold no pair, whose values are
    harmless and mean nothing.
    """

    policy_chosen: Float[Array, "P"]
    policy_rejected: Float[Array, "P"]
    reference_chosen: Float[Array, "P"] | None
    reference_rejected: Float[Array, "P"] | None
    chosen_length: Float[Array, "P"]
    rejected_length: Float[Array, "P"]
    present: Bool[Array, "P"]


PairLoss = Callable[[Pairs], Float[Array, "P"]]
Rewards = Callable[[Pairs], tuple[Float[Array, "P"], Float[Array, "P"]]]
"""The rewards of chosen and rejected responses, in the units that the loss compares."""

ParamsOf = Callable[[Params, Params], Params]
"""(trained, frozen) -> the parameters of a model: of the policy, or of its reference."""


Objective = Callable[[Responses, "Float[Array, 'B slots'] | None", Batch], tuple[Array, Array, Metrics]]
"""(scores of the policy, summed log-probabilities of the reference, batch) -> total, weight, metrics."""

TOKENS = ("inputs", "targets", "mask", "positions", "segments")
"""The fields of a batch that scoring reads."""


class LabelledResponses(NamedTuple):
    """Single responses with labels: log-probabilities (nats) of each, and of the mismatched one beside it, if any."""

    policy: Float[Array, "P"]
    reference: Float[Array, "P"]
    policy_mismatched: Float[Array, "P"] | None
    reference_mismatched: Float[Array, "P"] | None
    desirable: Bool[Array, "P"]
    present: Bool[Array, "P"]


def make_scorer(score: Score, *, slots: int, ld_alpha: float | None = None) -> Scorer:
    """Sums a model's token scores over each response; with ld_alpha, tokens beyond the other's length count that much.

    score: from `make_hidden_scorer` or `make_logits_scorer`. ld_alpha: of pairs, in [0, 1]; None is the plain sum, as
    1 is. Source: `jaxlm.losses.length_desensitised_sums`, here for packed rows.
    """

    def scorer(params: Params, batch: Batch, key: Array | None) -> Responses:
        stats = score(params, batch, key, ("logprob", "entropy"))
        segments = jnp.where(batch["mask"], batch["segments"], 0)
        length = segment_sums(jnp.ones(segments.shape), segments, slots)
        logprob, entropy = stats.logprob, stats.entropy
        if ld_alpha is not None:
            logprob = jnp.where(_beyond_shared(segments, length), ld_alpha * logprob, logprob)
        return Responses(segment_sums(logprob, segments, slots), segment_sums(entropy, segments, slots), length)

    return scorer


def segment_sums(x: Float[Array, "B T"], segments: Int[Array, "B T"], slots: int) -> Float[Array, "B slots"]:
    """The sum of x over each segment 1 … slots of each row, in float32; segment 0 is left out.

    >>> segment_sums(jnp.array([[1.0, 2.0, 4.0, 8.0]]), jnp.array([[1, 1, 2, 0]]), 3).tolist()
    [[3.0, 4.0, 0.0]]
    """
    here = segments[:, :, None] == jnp.arange(1, slots + 1, dtype=segments.dtype)
    return masked_sum(x[:, :, None], here, axis=1)


def _beyond_shared(segments: Int[Array, "B T"], length: Float[Array, "B slots"]) -> Bool[Array, "B T"]:
    """Where a token stands beyond the length of the shorter response of its pair."""
    pairs = length.reshape(length.shape[0], -1, 2)
    shared = jnp.broadcast_to(pairs.min(axis=-1, keepdims=True), pairs.shape).reshape(length.shape)
    last = jnp.cumsum(length, axis=1) - length + shared  # by counting the predicted tokens of the row from 1
    at = jnp.maximum(segments - 1, 0)
    return (segments > 0) & (jnp.cumsum(segments > 0, axis=1) > jnp.take_along_axis(last, at, axis=1))


def policy_alone(trained: Params, frozen: Params) -> Params:
    """The trained parameters are the model."""
    return trained


def frozen_alone(trained: Params, frozen: Params) -> Params:
    """The frozen parameters are the model."""
    return frozen


def make_preference_loss(
    scorer: Scorer, objective: Objective, *, policy: ParamsOf = policy_alone, reference: ParamsOf | None = None
) -> Callable[..., tuple[Array, Array, Metrics]]:
    """The `LossFn` of an objective, which may read frozen parameters.

    policy, reference: which parameters are the models'. With reference None the batch's field `reference` holds its
    summed log-probabilities [B, slots], and without that there is none.
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None, frozen: Params = None) -> tuple[Array, Array, Metrics]:
        referred = batch.get("reference")
        if reference is not None:
            referred = jax.lax.stop_gradient(scorer(reference(params, frozen), batch, None).logprob)
        return objective(scorer(policy(params, frozen), batch, key), referred, batch)

    return loss_fn


def make_preference_eval(
    score: Callable[[Params, Batch], Responses],
    objective: Objective,
    *,
    policy: ParamsOf = policy_alone,
    reference: ParamsOf | None = None,
) -> Callable[[tuple[Params, Params], Batch], Metrics]:
    """((trained, frozen), batch) -> metrics, with every model scored by one and the same compiled function.

    score: jitted; the one that made the cached reference. Where policy and reference hold the same parameters their
    scores are then equal to the last bit; with adapters, whose tree is another, to rounding. Not to be jitted again as
    a whole.
    """
    finish = jax.jit(lambda scored, referred, batch: per_step(objective(scored, referred, batch)[2]))

    def step(models: tuple[Params, Params], batch: Batch) -> Metrics:
        tokens = {name: batch[name] for name in TOKENS}
        referred = batch.get("reference")
        if reference is not None:
            referred = score(reference(*models), tokens).logprob
        return finish(score(policy(*models), tokens), referred, batch)  # type: ignore[no-any-return]

    return step


def make_pair_objective(loss: PairLoss, *, rewards: Rewards, beta: float) -> Objective:
    """A loss over pairs: total = sum over pairs, weight = number of pairs.

    loss: unreduced, from `jaxlm.losses`. beta: of the displacement that theory predicts. Metrics: loss;
    rewards_chosen, rewards_rejected, margins, accuracies (share of pairs whose chosen reward is higher);
    logprob_chosen, logprob_rejected (nats per response); entropy (nats per token); chosen_tokens, rejected_tokens,
    pairs; and, with a reference, those of `_against_reference`.
    """

    def objective(scored: Responses, reference: Array | None, batch: Batch) -> tuple[Array, Array, Metrics]:
        pairs = _pairs(scored, reference)
        n = jnp.sum(pairs.present, dtype=jnp.float32)
        total = masked_sum(loss(pairs), pairs.present)
        return total, n, _pair_metrics(pairs, scored, total, n, rewards) | _against_reference(pairs, n, beta)

    return objective


def _pairs(scored: Responses, reference: Float[Array, "B slots"] | None) -> Pairs:
    present = (scored.length > 0).reshape(-1, 2).all(axis=1)

    def split(x: Array, empty: float) -> tuple[Array, Array]:
        sides = x.reshape(-1, 2)
        # No loss has a singular value or gradient at one token of probability 1/e.
        return jnp.where(present, sides[:, 0], empty), jnp.where(present, sides[:, 1], empty)

    policy, lengths = split(scored.logprob, -1.0), split(scored.length, 1.0)
    referred = (None, None) if reference is None else split(reference, -1.0)
    return Pairs(policy[0], policy[1], referred[0], referred[1], lengths[0], lengths[1], present)


def _pair_metrics(pairs: Pairs, scored: Responses, total: Array, n: Array, rewards: Rewards) -> Metrics:
    chosen, rejected = jax.lax.stop_gradient(rewards(pairs))
    means: dict[str, Array] = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "margins": chosen - rejected,
        "accuracies": (chosen > rejected).astype(jnp.float32),
        "logprob_chosen": pairs.policy_chosen,
        "logprob_rejected": pairs.policy_rejected,
        "chosen_tokens": pairs.chosen_length,
        "rejected_tokens": pairs.rejected_length,
    }
    metrics: Metrics = {name: (masked_sum(x, pairs.present), n) for name, x in means.items()}
    tokens = scored.length.sum()
    counts: Metrics = {"tokens": (tokens, None), "pairs": (n, None)}
    return metrics | {"loss": (total, n), "entropy": (scored.entropy.sum(), tokens)} | counts


def _against_reference(pairs: Pairs, n: Array, beta: float) -> Metrics:
    """Displacement, observed and predicted, and the share of pairs that the policy orders more clearly.

    With a = log policy/reference of a response:

        displacement_chosen, _rejected      mean a: the change of their log-probabilities
        displacement_rejected_predicted     sum a e^(-beta a) / sum e^(-beta a) over the chosen
        displacement_chosen_predicted       sum a e^(+beta a) / sum e^(+beta a) over the rejected
        ordered                             share of pairs with a larger log-margin than the reference's

    The predictions hold at the optimum if chosen responses come from the reference and rejected ones from the
    distribution that DPO at beta needs: both then lie on the curve reference * e^(s a), at s = 0 and s = -beta, and
    each side's mean follows from the other's samples. Means of a over responses that the policy wrote itself would
    estimate KL(policy || reference); over the chosen they estimate -KL(reference || policy) under the same condition.
    Derived (`jaxlm.analysis.did.tilt`); exponents are bounded by 30.
    """
    if pairs.reference_chosen is None or pairs.reference_rejected is None:
        return {}
    a = jax.lax.stop_gradient(pairs.policy_chosen - pairs.reference_chosen)
    b = jax.lax.stop_gradient(pairs.policy_rejected - pairs.reference_rejected)

    def mean(x: Array) -> tuple[Array, Array]:
        return masked_sum(x, pairs.present), n

    def tilted(x: Array, s: float) -> tuple[Array, Array]:
        weight = jnp.exp(jnp.clip(s * x, -MAX_TILT, MAX_TILT))
        return masked_sum(weight * x, pairs.present), masked_sum(weight, pairs.present)

    return {
        "displacement_chosen": mean(a),
        "displacement_rejected": mean(b),
        "displacement_chosen_predicted": tilted(b, beta),
        "displacement_rejected_predicted": tilted(a, -beta),
        "ordered": mean((a > b).astype(jnp.float32)),
    }


def make_response_objective(
    loss: Callable[[LabelledResponses], Float[Array, "P"]], *, beta: float, mismatched: bool
) -> Objective:
    """A loss over single responses with labels: total = sum over responses, weight = their number.

    mismatched: whether every second segment is the completion of another row (examples="responses_mismatched").
    Metrics: loss, rewards_chosen and rewards_rejected (of desirable and undesirable responses, beta * log-ratio),
    logprob_chosen, logprob_rejected, entropy, tokens, responses.
    """

    def objective(scored: Responses, reference: Array | None, batch: Batch) -> tuple[Array, Array, Metrics]:
        responses = _responses(scored, reference, batch, mismatched)
        n = jnp.sum(responses.present, dtype=jnp.float32)
        total = masked_sum(loss(responses), responses.present)
        return total, n, _response_metrics(responses, scored, total, n, beta)

    return objective


def _responses(scored: Responses, reference: Any, batch: Batch, mismatched: bool) -> LabelledResponses:
    step = 2 if mismatched else 1

    def own(x: Array) -> Array:
        return x[:, ::step].reshape(-1)

    def other(x: Array) -> Array | None:
        return x[:, 1::step].reshape(-1) if mismatched else None

    return LabelledResponses(
        own(scored.logprob), own(reference), other(scored.logprob), other(reference), own(batch["labels"]),
        own(scored.length) > 0,
    )  # fmt: skip


def _response_metrics(r: LabelledResponses, scored: Responses, total: Array, n: Array, beta: float) -> Metrics:
    reward = jax.lax.stop_gradient(beta * (r.policy - r.reference))
    metrics: Metrics = {"loss": (total, n)}
    for name, kept in (("chosen", r.present & r.desirable), ("rejected", r.present & ~r.desirable)):
        count = jnp.sum(kept, dtype=jnp.float32)
        metrics[f"rewards_{name}"] = (masked_sum(reward, kept), count)
        metrics[f"logprob_{name}"] = (masked_sum(r.policy, kept), count)
    tokens = scored.length.sum()
    counts: Metrics = {"tokens": (tokens, None), "responses": (n, None)}
    return metrics | {"entropy": (scored.entropy.sum(), tokens)} | counts
