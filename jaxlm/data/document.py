"""A tokenised document (or example): what sources and tokenizers hand to packing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """tokens int32 [n]; mask bool [n], True where the token is to be predicted; target_bytes int32 [n], the bytes of
    text that each token stands for (0 for special tokens); origin, "file:row", for messages; label, for responses that
    are judged one by one: True if this one is desirable."""

    tokens: np.ndarray
    mask: np.ndarray
    target_bytes: np.ndarray
    origin: str
    label: bool = False


def make_document(
    tokens: np.ndarray, *, mask: np.ndarray | None = None, token_bytes: np.ndarray, origin: str
) -> Document:
    """A document from its tokens; mask None predicts every token; token_bytes [V] as `Tokenizer.token_bytes()`."""
    tokens = np.asarray(tokens, np.int32)
    mask = np.ones(len(tokens), bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"{origin}: {len(tokens)} tokens with a mask of {len(mask)}")
    return Document(tokens, mask, token_bytes[tokens].astype(np.int32), origin)
