"""Timing that a busy machine cannot skew: the candidates take turns, so that noise falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, in `rounds` rounds whose order rotates by one place.

    candidates: name -> function of no arguments; its result is waited for with `jax.block_until_ready`.
    rounds: timed calls of each, at least 1; warmup: calls of each before, which pay for compilation and page faults.
    Result: name -> `rounds` seconds, in the order in which they were measured; compare candidates round by round.

    >>> times = interleave({"sum": lambda: sum(range(100)), "max": lambda: max(range(100))}, rounds=3, warmup=1)
    >>> {name: len(seconds) for name, seconds in times.items()}
    {'sum': 3, 'max': 3}
    """
    if rounds < 1 or not candidates:
        raise ValueError(f"expected at least one round and one candidate, found rounds={rounds}, {len(candidates)=}")
    for _ in range(warmup):
        for call in candidates.values():
            jax.block_until_ready(call())
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_seconds(candidates[name]))
    return times


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median seconds of each candidate.

    >>> medians({"a": [1.0, 9.0, 2.0]})
    {'a': 2.0}
    """
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def speedups(times: Mapping[str, Sequence[float]], *, baseline: str) -> dict[str, float]:
    """How many times faster than `baseline` each candidate is: the ratio of the medians (above 1 is faster).

    >>> speedups({"old": [2.0, 2.0], "new": [1.0, 1.0]}, baseline="old")
    {'old': 1.0, 'new': 2.0}
    """
    if baseline not in times:
        raise ValueError(f"unknown baseline {baseline!r}: expected one of {', '.join(times)}")
    middle = medians(times)
    return {name: middle[baseline] / seconds for name, seconds in middle.items()}
