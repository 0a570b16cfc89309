"""What a run reads, as one typed record."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.data.sources import SourceConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, and the shape and order of batches.

    tokenizer: "bytes", a sentencepiece .model, or a folder with a tokenizer. train: sources, mixed by their weights.
    heldout: sources evaluated on, each by its name. sequence_length: targets per row. batch_size: rows per step over
    all devices and hosts. examples: what a row of a source is: documents (text, an example, a conversation), pairs
    (chosen and rejected), chosen or rejected (one side of pairs, to fine-tune on), responses (each with a label),
    responses_mismatched (the same, each with another row's completion after its prompt, which KTO's baseline needs);
    see `jaxlm.data.preference`. packing: stream (text in a line, cut; documents only), pack (whole examples), pad (one
    a row). epochs: how often the data may repeat; a run that needs more is refused before step 0. completion_only: see
    `jaxlm.data.encode.Encoder`. bad_rows: refuse stops at the first bad row, skip counts and leaves them out. overlong:
    what pack and pad do with an example beyond sequence_length (of a pair, the sum of both): refuse, skip (counted), or
    truncate at the end (counted; one that would keep no target is skipped and counted). cache_dir: keeps tokenised
    corpora. num_threads: workers that make batches ahead; 0 makes them in the loop.
    """

    train: tuple[SourceConfig, ...]
    heldout: tuple[SourceConfig, ...] = ()
    tokenizer: str = "bytes"
    sequence_length: int = 512
    batch_size: int = 8
    eval_batch_size: int | None = None
    examples: Literal["documents", "chosen", "rejected", "pairs", "responses", "responses_mismatched"] = "documents"
    packing: Literal["stream", "pack", "pad"] = "stream"
    shuffle: bool = True
    seed: int = 0
    epochs: int = 1
    completion_only: bool = True
    chat_template: str | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"
    overlong: Literal["refuse", "skip", "truncate"] = "refuse"
    cache_dir: str | None = None
    num_threads: int = 2

    def __post_init__(self) -> None:
        if not self.completion_only and self.examples not in ("documents", "chosen", "rejected"):
            raise ValueError(
                f"data.completion_only=False would count the prompt in every response of data.examples="
                f"{self.examples!r}: leave it True"
            )
        if self.examples != "documents" and self.packing == "stream":
            raise ValueError(
                f"data.examples={self.examples!r} are never cut into a stream: set data.packing to 'pack' (several in "
                "a row, no padding computed) or 'pad' (one in a row)"
            )

    @property
    def group(self) -> int:
        """The documents of one example, which stay together in a row."""
        return 2 if self.examples in ("pairs", "responses_mismatched") else 1
