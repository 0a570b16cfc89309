"""Rows of preferences and what a short template makes of them, for the tests of pairs and responses."""

from __future__ import annotations

import numpy as np

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.document import Document
from jaxlm.data.sources import SourceConfig
from jaxlm.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
# Short on purpose: the first letter of the role, the text, and a mark that ends the turn.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, str]:
    return said("user", content)


def assistant(content: str) -> dict[str, str]:
    return said("assistant", content)


def config(rows=(), **options) -> DataConfig:
    source = SourceConfig("memory", rows=tuple(rows), **options.pop("fields", {}))
    base = dict(train=(source,), sequence_length=64, batch_size=1, packing="pad", examples="pairs", shuffle=False)
    return DataConfig(**base | options)


def corpus(rows=(), **options):
    return pipeline.build(config(rows, **options), BYTES).train.sources[0].corpus


def shown(document: Document) -> str:
    """Tokens as characters (begin ^, end $), those that are predicted in brackets."""
    out = ""
    for token, trained in zip(document.tokens, document.mask):
        character = {256: "^", 257: "$"}.get(int(token)) or chr(token)
        out += f"[{character}]" if trained else character
    return out


def many(n: int = 23, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of ragged lengths that tell their number: "<i>" asks, "c<i>…" is chosen, "r<i>…" rejected."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"<{i}>" + "p" * rng.integers(5),
            "chosen": f"c{i}" + "." * rng.integers(9),
            "rejected": f"r{i}" + "." * rng.integers(9),
        }
        for i in range(n)
    ]
