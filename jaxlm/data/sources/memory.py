"""Rows that the config or the caller already holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A sequence of dicts as a source."""

    rows: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    def origin(self, i: int) -> str:
        """memory:row, from 0."""
        return f"memory:{i}"
