"""What an experiment of the DID recipe is: settings in, measured numbers out, each with the range it must fall in."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the experiments; the defaults are the reference settings, for which the figures hold.

    num_responses: of the random problems. num_seeds: problems that are averaged over (at least 3). num_steps: of the
    stochastic training (at least 100). num_repeats: of the estimator and of the random draws. num_pairs: the sizes of
    the fixed sets. num_zipf: responses of the controlled pair of data sets. Of the language model: language_length,
    tokens per response (at least 2; 4^length are enumerated); num_language_steps of training (a multiple of 50);
    num_language_seeds, which are judged whatever their number.
    """

    num_responses: int = 32
    num_seeds: int = 5
    num_steps: int = 2000
    num_repeats: int = 200
    num_pairs: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    num_zipf: int = 1000
    language_length: int = 6
    num_language_steps: int = 300
    num_language_seeds: int = 1


@dataclasses.dataclass(frozen=True)
class Check:
    """One measured number and the range that it must fall in; None leaves a side open.

    at_reference_only: the range belongs to the reference settings.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    at_reference_only: bool = False

    @property
    def passed(self) -> bool:
        """Within the range; NaN never is, unless the range is open on both sides."""
        if self.low is None and self.high is None:
            return True
        return (-np.inf if self.low is None else self.low) <= self.value <= (np.inf if self.high is None else self.high)


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment measured: `checks` for the table, `series` (plain lists and numbers) for the plot."""

    name: str
    title: str
    checks: tuple[Check, ...]
    series: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def near(name: str, value: Any, figure: float, tolerance: float) -> Check:
    """A figure of the reference settings, to within a tolerance."""
    return Check(name, float(value), figure - tolerance, figure + tolerance, at_reference_only=True)


def below(name: str, value: Any, bound: float, *, at_reference_only: bool = False) -> Check:
    """At most a bound."""
    return Check(name, float(value), high=bound, at_reference_only=at_reference_only)


def above(name: str, value: Any, bound: float, *, at_reference_only: bool = False) -> Check:
    """At least a bound."""
    return Check(name, float(value), low=bound, at_reference_only=at_reference_only)
