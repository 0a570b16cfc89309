"""Rows that the config or the caller already holds."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from jaxlm.data.errors import BadRow


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A sequence of dicts as a source."""

    rows: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not isinstance(self.rows[i], dict):
            raise BadRow(self.origin(i), "wrong type", f"expected a dict, found {type(self.rows[i]).__name__}")
        return self.rows[i]

    def origin(self, i: int) -> str:
        """memory:row, from 0."""
        return f"memory:{i}"

    def key(self, i: int) -> str:
        """memory:row, from 0."""
        return f"memory:{i}"

    def version(self) -> str:
        """A hash of the rows."""
        return hashlib.sha256(repr(list(self.rows)).encode()).hexdigest()[:16]
