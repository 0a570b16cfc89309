"""A row that cannot be used: which one, why, and what to do."""

from __future__ import annotations


class BadRow(ValueError):
    """Raised for one row: `origin` is file:row, `reason` a short class to count by, the message says what was found."""

    def __init__(self, origin: str, reason: str, found: str):
        cure = "mend the row, or set data.bad_rows='skip' to count and skip such rows"
        super().__init__(f"{origin}: {reason}: {found} ({cure})")
        self.origin, self.reason = origin, reason
