"""Which row of which data set comes r-th: a pure function of (seed, r), exact in its proportions.

The global sequence is cut into blocks. In each block every data set has its quota (largest remainder, so a block is
exact to one row), in an order drawn from (seed, block). Within a data set, rows are permuted anew every epoch, drawn
from (seed, epoch). Nothing is remembered between calls, so any step can be asked for at once, on any host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

BLOCK = 1024


class Part(NamedTuple):
    """One data set of a mixture: its rows, its share of the whole (any positive scale), how often it may repeat."""

    num_rows: int
    weight: float = 1.0
    epochs: int = 1
    name: str = "data"


class Mixture:
    """Locates row r of the mixture as (part, row of that part).

    Raises ValueError for an empty part, a weight that is not positive, or one so small that a block of 1,024 rows
    would never hold it.
    """

    def __init__(self, parts: Sequence[Part], *, seed: int, shuffle: bool = True):
        if not parts:
            raise ValueError("a mixture needs at least one data set")
        self.parts, self.seed, self.shuffle = tuple(parts), seed, shuffle
        self.quotas = _quotas(self.parts)
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._permutation = lru_cache(maxsize=2 * len(self.parts))(self._make_permutation)

    def __len__(self) -> int:
        """Rows until the first part runs out of its epochs."""
        if len(self.parts) == 1:
            return self.parts[0].num_rows * self.parts[0].epochs
        full = min(p.num_rows * p.epochs // int(q) for p, q in zip(self.parts, self.quotas))
        used, order = full * self.quotas, self._block(full)[0]
        for rank, part in enumerate(order):  # the block in which the first part runs out
            used[part] += 1
            if used[part] > self.parts[part].num_rows * self.parts[part].epochs:
                return full * BLOCK + rank
        return (full + 1) * BLOCK

    def locate(self, r: int) -> tuple[int, int]:
        """(part, row of the part) of the mixture's row r."""
        if len(self.parts) == 1:
            part, nth = 0, r
        else:
            block, rank = divmod(r, BLOCK)
            order, ranks = self._block(block)
            part = int(order[rank])
            nth = block * int(self.quotas[part]) + int(ranks[rank])
        epoch, i = divmod(nth, self.parts[part].num_rows)
        return part, int(self._permutation(part, epoch)[i]) if self.shuffle else i

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The part at each rank of the block, and how many of that part came before it in the block."""
        order = np.repeat(np.arange(len(self.parts)), self.quotas)
        order = _generator(self.seed, 1, block).permutation(order)
        ranks = np.zeros(BLOCK, np.int64)
        for part in range(len(self.parts)):
            here = order == part
            ranks[here] = np.arange(here.sum())
        return order, ranks

    def _make_permutation(self, part: int, epoch: int) -> np.ndarray:
        return _generator(self.seed, 2, part, epoch).permutation(self.parts[part].num_rows)


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def _quotas(parts: Sequence[Part]) -> np.ndarray:
    for part in parts:
        if part.num_rows < 1:
            raise ValueError(f"data set {part.name!r} has no rows")
        if not part.weight > 0 or part.epochs < 1:
            raise ValueError(
                f"data set {part.name!r}: weight and epochs must be positive, found {part.weight} and {part.epochs}"
            )
    share = np.array([p.weight for p in parts], np.float64)
    exact = BLOCK * share / share.sum()
    quotas = np.floor(exact).astype(np.int64)
    for i in np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]:
        quotas[i] += 1
    for part, quota in zip(parts, quotas):
        if not quota:
            raise ValueError(f"data set {part.name!r}: weight {part.weight} is below 1/{BLOCK} of the whole: raise it")
    return quotas
