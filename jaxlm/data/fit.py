"""Examples within the length of a row: refused, skipped or cut, never in silence."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from jaxlm.data.collate import num_targets
from jaxlm.data.config import DataConfig
from jaxlm.data.document import Document
from jaxlm.data.errors import BadRow

OVERLONG = "over-long"

Group = tuple[Document, ...]
"""The documents of one example, which stay together in a row: one, or the two of a pair."""


def fit(group: Group, cfg: DataConfig, skipped: collections.Counter[str]) -> Group:
    """The example within sequence_length targets, by the rule of cfg.overlong; BadRow where that leaves it out."""
    lengths = [num_targets(d) for d in group]
    if sum(lengths) <= cfg.sequence_length:
        return group
    if cfg.overlong != "truncate":
        found = " + ".join(map(str, lengths))
        raise BadRow(
            group[0].origin, OVERLONG, f"{found} targets, sequence_length={cfg.sequence_length} (or set data.overlong)"
        )
    cut = tuple(_cut(d, room) for d, room in zip(group, shares(lengths, cfg.sequence_length)))
    if not all(d.mask[1:].any() for d in cut):
        raise BadRow(group[0].origin, OVERLONG, "truncation would leave nothing to predict")
    skipped["truncated"] += 1
    return cut


def shares(lengths: Sequence[int], total: int) -> list[int]:
    """What each gets of `total`: its length where that is at most an equal share of what the shorter ones leave.

    >>> shares([10, 50], 40), shares([30, 50], 40), shares([5, 8], 40)
    ([10, 30], [20, 20], [5, 8])
    """
    found = [0] * len(lengths)
    left = total
    for taken, i in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        found[i] = min(lengths[i], left // (len(lengths) - taken))
        left -= found[i]
    return found


def _cut(d: Document, targets: int) -> Document:
    keep = slice(targets + 1)
    return d._replace(tokens=d.tokens[keep], mask=d.mask[keep], target_bytes=d.target_bytes[keep])
