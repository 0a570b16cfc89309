"""The arrays of a batch, in one place. A row holds one or several whole or cut documents ("segments").

    inputs        int32 [B, T]   token that the model reads
    targets       int32 [B, T]   token that it must predict there (the next one of the same document)
    mask          bool  [B, T]   True where the target counts in the loss
    positions     int32 [B, T]   position within the segment, from 0
    segments      int32 [B, T]   1, 2, … per document in the row; 0 is padding
    target_bytes  int32 [B, T]   bytes of text that the target stands for (0 for special tokens): bits per byte
"""

from __future__ import annotations

import numpy as np

Row = dict[str, np.ndarray]
"""The arrays of one row: each [T]."""

FIELDS: dict[str, type[np.generic]] = {
    "inputs": np.int32,
    "targets": np.int32,
    "mask": np.bool_,
    "positions": np.int32,
    "segments": np.int32,
    "target_bytes": np.int32,
}


def empty_row(length: int, *, pad_id: int = 0) -> Row:
    """A row of padding: segment 0, nothing counts."""
    row = {name: np.zeros(length, dtype) for name, dtype in FIELDS.items()}
    row["inputs"][:] = row["targets"][:] = pad_id
    return row


def stack_rows(rows: list[Row]) -> dict[str, np.ndarray]:
    """Rows to a batch: each field stacked on a new axis 0."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
