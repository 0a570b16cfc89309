"""Preference losses by name, for configs: which there are, what each needs, and sums of several."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from jaxlm import losses
from jaxlm.losses.scores import Divergence
from jaxlm.train.preference import LabelledResponses, PairLoss, Pairs, Rewards
from jaxlm.typing import Array, Float

PAIRS: Mapping[str, Callable[..., Float[Array, "B"]]] = {
    f.__name__: f
    for f in (
        losses.dpo, losses.cdpo, losses.robust_dpo, losses.hinge, losses.ipo, losses.ipo_sum, losses.dpo_norm,
        losses.exo, losses.nca, losses.bco_pair, losses.sppo_hard, losses.apo_zero, losses.apo_down, losses.discopop,
        losses.aot, losses.aot_unpaired, losses.cpo, losses.simpo, losses.alphapo, losses.orpo, losses.sft,
    )
}  # fmt: skip
"""Losses of pairs (data.examples = "pairs")."""

RESPONSES = ("kto", "bco", "apo_zero_unpaired")
"""Losses of single responses with labels ("responses"; kto: "responses_mismatched")."""

BY_RANK = ("aot", "aot_unpaired")
"""Losses that sort over the batch."""

OVER_BATCH = (*BY_RANK, "kto", "bco")
"""Losses of one response that depend on the others of the batch, which micro-batches would change."""

PER_TOKEN = ("simpo", "alphapo", "orpo", "ipo", "dpo_norm")
"""Losses that compare means per token."""


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """One loss of a sum. name: a function of `jaxlm.losses`. options: its keyword arguments (beta, label_smoothing, …).
    None: beta 0.1 where it takes a beta. divergence: of the losses that take one; alpha_divergence with alpha.

    ORPO's and CPO's likelihood term is a second term, "sft": the mean over the completion's tokens. The published ORPO
    takes it over prompt and completion. The baseline of bco is the mean of the batch, of kto that of its mismatched
    completions, in evaluation too.
    """

    name: str = "dpo"
    weight: float = 1.0
    options: dict[str, float] | None = None
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        known = (*PAIRS, *RESPONSES)
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, 3, 0.4) or sorted(known)
            raise ValueError(f"losses: {self.name!r} is none of them; did you mean {' or '.join(near)}?")
        takes = _options(self.name)
        if self.options is None:
            object.__setattr__(self, "options", {"beta": 0.1} if "beta" in takes else {})
        unknown = sorted(self.options.keys() - takes.keys())
        missing = sorted(name for name, required in takes.items() if required and name not in self.options)
        if unknown or missing:
            raise ValueError(
                f"losses.{self.name}: expected the options {', '.join(takes) or 'none'}, found "
                f"{', '.join(self.options) or 'none'}" + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        if self.divergence != "reverse_kl" and "divergence" not in inspect.signature(_function(self.name)).parameters:
            raise ValueError(f"losses.{self.name} takes no divergence, found {self.divergence!r}: leave it out")

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference model."""
        return self.name in RESPONSES or "reference_chosen" in inspect.signature(PAIRS[self.name]).parameters


def _function(name: str) -> Callable[..., Any]:
    return getattr(losses, name)  # type: ignore[no-any-return]


def _options(name: str) -> dict[str, bool]:
    """The numbers that a loss takes, and whether it must be given them."""
    given = {*Pairs._fields, "policy", "reference", "desirable", "baseline", "divergence", "chosen_nll"}
    parameters = inspect.signature(_function(name)).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.name not in given}


def check_terms(terms: Sequence[LossTerm], *, examples: str, num_microbatches: int) -> None:
    """Raises ValueError unless the losses can be summed, fit the data, and mean the same under accumulation."""
    if not terms:
        raise ValueError("losses: expected at least one")
    names = [t.name for t in terms]
    unpaired = [n for n in names if n in RESPONSES]
    if unpaired and len(names) > 1:
        raise ValueError(f"losses: {unpaired[0]} is of single responses and is never summed with others, found {names}")
    needs = "pairs" if not unpaired else "responses_mismatched" if unpaired == ["kto"] else "responses"
    if examples != needs:
        raise ValueError(f"losses: {names[0]} needs data.examples={needs!r}, found {examples!r}")
    coupled = [n for n in names if n in OVER_BATCH]
    if coupled and num_microbatches > 1:
        raise ValueError(
            f"losses: {coupled[0]} depends on the whole batch, so micro-batches would change it: set "
            f"train.num_microbatches=1, found {num_microbatches}"
        )


def beta_of(terms: Sequence[LossTerm]) -> float:
    """The first beta among the terms; 1 if none has one."""
    return next((t.options["beta"] for t in terms if "beta" in t.options), 1.0)


def make_rewards(terms: Sequence[LossTerm]) -> Rewards:
    """What the first loss compares: beta times the log-ratio, or, without a reference, the log-probability; per token
    where the loss takes means."""
    beta, first = beta_of(terms), terms[0]

    def rewards(p: Pairs) -> tuple[Array, Array]:
        chosen, rejected = p.policy_chosen, p.policy_rejected
        if first.needs_reference and p.reference_chosen is not None and p.reference_rejected is not None:
            chosen, rejected = chosen - p.reference_chosen, rejected - p.reference_rejected
        if first.name in PER_TOKEN:
            chosen, rejected = chosen / p.chosen_length, rejected / p.rejected_length
        return beta * chosen, beta * rejected

    return rewards


def make_pair_values(terms: Sequence[LossTerm]) -> PairLoss:
    """The weighted sum of the terms, one value per pair."""

    def loss(pairs: Pairs) -> Float[Array, "P"]:
        values = [_pair_value(term, pairs) for term in terms]
        return losses.weighted_sum(values, [term.weight for term in terms])

    return loss


def _pair_value(term: LossTerm, pairs: Pairs) -> Float[Array, "P"]:
    function = PAIRS[term.name]
    takes = inspect.signature(function).parameters
    if term.name in BY_RANK:
        pairs = _empty_last(pairs, paired=term.name == "aot")
    arrays = {name: x for name, x in pairs._asdict().items() if name in takes}
    maps = {"divergence": _divergence(term)} if "divergence" in takes else {}
    values = function(**arrays, **maps, **term.options)
    return _where_present(values, pairs.present) if term.name in BY_RANK else values


def _divergence(term: LossTerm) -> Divergence:
    function = getattr(losses, term.divergence)
    return partial(function, alpha=term.alpha) if term.divergence == "alpha_divergence" else function


def _empty_last(p: Pairs, *, paired: bool) -> Pairs:
    """Empty slots sort behind all pairs on both sides: a huge margin of the policy and of the reference (paired), or a
    huge log-ratio of chosen and of rejected."""

    def fill(x: Array | None, value: float) -> Array:
        assert x is not None  # these losses need a reference
        return jnp.where(p.present, x, value)

    huge = 1e30
    return p._replace(
        policy_chosen=fill(p.policy_chosen, huge),
        policy_rejected=fill(p.policy_rejected, 0.0 if paired else huge),
        reference_chosen=fill(p.reference_chosen, huge if paired else 0.0),
        reference_rejected=fill(p.reference_rejected, 0.0),
    )


def _where_present(by_rank: Float[Array, "P"], present: Array) -> Float[Array, "P"]:
    """Values by rank, the empty slots' last, laid into the slots that hold pairs: their sum is what counts."""
    rank = jnp.cumsum(present) - 1
    return jnp.where(present, by_rank[jnp.maximum(rank, 0)], 0.0)


def make_response_values(term: LossTerm) -> Callable[[LabelledResponses], Float[Array, "P"]]:
    """One value per response, with the baseline of kto and bco taken over the batch."""

    def loss(r: LabelledResponses) -> Float[Array, "P"]:
        three = (r.policy, r.reference, r.desirable)
        if term.name == "kto":
            assert r.policy_mismatched is not None and r.reference_mismatched is not None  # check_terms
            baseline = losses.kto_baseline(r.policy_mismatched, r.reference_mismatched, r.present)
            return losses.kto(*three, baseline=baseline, **term.options)
        if term.name == "bco":
            beta = term.options["beta"]
            baseline, _ = losses.bco_baseline(r.policy, r.reference, beta=beta, mask=r.present)
            return losses.bco(*three, baseline=baseline, **term.options)
        return losses.apo_zero_unpaired(*three, **term.options)

    return loss
