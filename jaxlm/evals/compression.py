"""What general-purpose compressors make of the same held-out bytes: the baseline that any language model must beat."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Mapping

COMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def compressed_bpb(documents: Iterable[bytes], *, method: str) -> float:
    """Bits per byte of a compressor at its strongest setting on the concatenated documents.

    bpb = 8 * compressed bytes / raw bytes. The compressor starts empty (it has not seen the training text) and sees
    every document after those before it, so it has a longer memory than a model with a short context.

    documents: raw bytes; method: "zlib", "bz2" or "lzma". Raises ValueError on an unknown method or no bytes at all.

    >>> compressed_bpb([b"ab" * 1000], method="zlib") < 0.1  # implementations of zlib differ by a byte or two
    True
    """
    if method not in COMPRESSORS:
        raise ValueError(f"unknown compressor {method!r}: expected one of {', '.join(COMPRESSORS)}")
    data = b"".join(documents)
    if not data:
        raise ValueError("there are no held-out bytes to compress; check the evaluation sources of the config")
    return 8 * len(COMPRESSORS[method](data)) / len(data)
