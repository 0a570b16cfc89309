"""A batch as a person reads it: the text of every segment, what is trained on, and the arrays token by token.

In text, ⟦…⟧ holds what is predicted and counts in the loss; the rest is context. The first token of a segment is never
predicted. Characters that would disturb a terminal are written as escapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


class Decoder(Protocol):
    """What showing a batch needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


OPEN, CLOSE = "⟦", "⟧"


def render_batch(
    batch: Mapping[str, np.ndarray], tokenizer: Decoder, *, rows: int | None = None, width: int = 400
) -> str:
    """Every row, segment by segment: counts, positions, and text with the trained spans in brackets.

    batch: the fields of `jaxlm.data.batch`, each [B, T]; rows: how many (None: all); width: characters of text per
    segment, the middle left out beyond that.
    """
    num_rows = len(batch["inputs"]) if rows is None else min(rows, len(batch["inputs"]))
    shape = " x ".join(map(str, batch["inputs"].shape))
    padding = int((batch["segments"] == 0).sum())
    blocks = [f"batch of {shape} tokens: {int(batch['mask'].sum()):,} targets, {padding:,} padding"]
    for r in range(num_rows):
        row = {name: np.asarray(x[r]) for name, x in batch.items()}
        blocks.append(_render_row(r, row, tokenizer, width))
    return "\n".join(blocks)


def _render_row(number: int, row: Mapping[str, np.ndarray], tokenizer: Decoder, width: int) -> str:
    segments = [s for s in np.unique(row["segments"]) if s]
    padding = int((row["segments"] == 0).sum())
    lines = [
        f"row {number}: {len(segments)} segments, {int(row['mask'].sum())} targets, "
        f"{int(row['target_bytes'].sum())} bytes, {padding} padding"
    ]
    for s in segments:
        here = row["segments"] == s
        at, positions = np.flatnonzero(here), row["positions"][here]
        text = _marked_text(row["inputs"][here], row["targets"][here], row["mask"][here], tokenizer)
        if len(text) > width:
            text = f"{text[: width // 2]} …[{len(text) - width:,} characters]… {text[-width // 2 :]}"
        lines.append(f"  segment {s} at {at[0]}-{at[-1]}, positions {positions[0]}-{positions[-1]}: {text}")
    return "\n".join(lines)


def _marked_text(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, tokenizer: Decoder) -> str:
    """The segment's tokens as text: its first input, then every target, grouped by whether it counts."""
    tokens = np.concatenate([inputs[:1], targets])
    trained = np.concatenate([[False], mask])
    edges = np.flatnonzero(np.diff(trained)) + 1
    out = []
    for span in np.split(np.arange(len(tokens)), edges):
        text = _printable(tokenizer.decode(tokens[span].tolist()))
        out.append(f"{OPEN}{text}{CLOSE}" if trained[span[0]] else text)
    return "".join(out)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def render_tokens(
    batch: Mapping[str, np.ndarray], tokenizer: Decoder, *, row: int = 0, limit: int | None = None
) -> str:
    """One row as a table, a line per position: segment, position, input, target, and whether the target counts.

    >>> from jaxlm.data.tokenizer import ByteTokenizer
    >>> one = {"inputs": [[256, 72]], "targets": [[72, 105]], "mask": [[True, False]], "positions": [[0, 1]],
    ...        "segments": [[1, 1]], "target_bytes": [[1, 1]]}
    >>> print(render_tokens({k: np.array(v) for k, v in one.items()}, ByteTokenizer()))
    index  segment  position  input    target   counts
        0        1         0  256 ''   72 'H'   yes
        1        1         1  72 'H'   105 'i'  no
    """
    stop = batch["inputs"].shape[1] if limit is None else limit
    fields = {name: np.asarray(x[row][:stop]) for name, x in batch.items()}

    def token(i: int) -> str:
        return f"{i} {_printable(tokenizer.decode([int(i)]))!r}"

    lines = [["index", "segment", "position", "input", "target", "counts"]]
    for i in range(len(fields["inputs"])):
        cells = [str(i), str(fields["segments"][i]), str(fields["positions"][i])]
        cells += [token(fields["inputs"][i]), token(fields["targets"][i]), "yes" if fields["mask"][i] else "no"]
        lines.append(cells)
    widths = [max(len(line[c]) for line in lines) for c in range(6)]
    return "\n".join(
        "  ".join(cell.rjust(w) if c < 3 else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )
