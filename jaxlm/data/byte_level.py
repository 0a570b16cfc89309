"""The printable alphabet in which byte-level BPE vocabularies write raw bytes."""

from __future__ import annotations

from functools import cache


@cache
def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes take code points from 256 upwards.

    Source: Radford et al., 2019 (GPT-2), released encoder.

    >>> byte_level_alphabet()["Ġ"]
    32
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
