"""Examples:

  jaxlm tokenizer --text corpus/ --vocab-size 8000 --out tokenizer/
  jaxlm tokenizer --jsonl docs.jsonl.gz --text-field text --vocab-size 16000 --out tokenizer/

Trains a sentencepiece BPE model that loses nothing: no normalisation, spaces kept as they are, bytes for what it has
not seen. Then `data.tokenizer = "tokenizer/tokenizer.model"` in a config. A share of the rows is left out of the
training and used to report bytes per token: with the heldout_share of the config, they are the rows that it holds out.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.data.encode import text_of
from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer import SentencePieceTokenizer

# The trainer drops a whole sentence that holds one of the characters that it uses for itself, and one that is too long.
RESERVED = re.compile("[\\0\t\u2047\u2581\u2585]")
SENTENCE_BYTES = 16_384
LOSSLESS = dict(
    model_type="bpe",
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    byte_fallback=True,
    character_coverage=0.9995,
    max_sentence_length=SENTENCE_BYTES,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=3,
    minloglevel=2,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm tokenizer`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="PATH", help="text files: one, a folder, or a glob")
    source.add_argument("--jsonl", metavar="PATH", help="JSON lines, also .gz and .zst")
    source.add_argument("--stdlib", action="store_true", help="the Python standard library's own sources")
    parser.add_argument("--text-field", default="text", help="the field of a JSON row that is trained on")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=50_000_000, help="text read at most (default 50 MB)")
    parser.add_argument("--heldout-share", type=float, default=0.01, help="share of rows left out (default 0.01)")
    parser.add_argument("--symbols", nargs="+", default=[], help="become one piece each: '<|im_start|>' '<|im_end|>'")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where tokenizer.model is written")


def main(args: argparse.Namespace) -> int:
    """Trains, saves, and reports bytes per token on the rows left out."""
    kind: Literal["text", "jsonl", "stdlib"] = "stdlib" if args.stdlib else "text" if args.text else "jsonl"
    where = dict(kind=kind, path=args.text or args.jsonl, text_field=args.text_field, heldout_share=args.heldout_share)
    texts = _texts(SourceConfig(**where, part="train"), args.max_bytes)
    model = train_sentencepiece(texts, vocab_size=args.vocab_size, user_defined_symbols=args.symbols)
    path = Path(args.out) / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)
    print(f"{path}: {SentencePieceTokenizer(path).vocab_size:,} pieces")
    try:
        heldout = list(_texts(SourceConfig(**where, part="heldout"), args.max_bytes))
    except ValueError:
        print("no row was left out to measure on: the source has too few")
        return 0
    print(report(SentencePieceTokenizer(path), heldout))
    return 0


def report(tokenizer: SentencePieceTokenizer, texts: list[str]) -> str:
    """Bytes per token on the texts, and how the first of them begins, piece by piece."""
    num_bytes = sum(len(t.encode()) for t in texts)
    num_tokens = sum(len(tokenizer.encode_plain(t)) for t in texts)
    sample = " ".join(repr(tokenizer.decode([i])) for i in tokenizer.encode_plain(texts[0][:60]))
    return (
        f"{num_bytes / max(num_tokens, 1):.3f} bytes per token on {len(texts):,} rows that were left out "
        f"({num_bytes:,} bytes)\nsample: {sample}"
    )


def _texts(source: SourceConfig, max_bytes: int) -> Iterator[str]:
    """The source's texts in an arbitrary but fixed order, up to max_bytes: a fair sample where there is more."""
    rows, left = open_source(source), max_bytes
    for n, i in enumerate(np.random.default_rng(0).permutation(len(rows))):
        if left <= 0:
            print(f"read {n:,} of {len(rows):,} rows: the others are beyond {max_bytes:,} bytes (--max-bytes)")
            return
        text = text_of(rows[int(i)], rows.origin(int(i)), field=source.text_field)[:left]
        left -= len(text.encode())
        yield text


def _sentences(text: str) -> Iterator[str]:
    """The text in pieces that the trainer takes; newlines stay in them, so that vocabulary can hold them."""
    for part in RESERVED.split(text):
        for start in range(0, len(part), SENTENCE_BYTES // 4):
            yield part[start : start + SENTENCE_BYTES // 4]


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, **options: Any) -> bytes:
    """A BPE model, as the bytes of its file, that encodes every text without loss.

    Identity normalisation, no space put before the text, runs of spaces kept, newlines inside pieces, digits one by
    one, and byte fallback (tabs are bytes). Ids: 0 unknown, 1 begin, 2 end, 3 padding, 4-259 bytes. options:
    sentencepiece's own, for instance user_defined_symbols=["<|im_start|>", "<|im_end|>"]. Raises ValueError if the
    texts are too few for vocab_size, or vocab_size too small for their characters.
    """
    import sentencepiece

    out = io.BytesIO()
    sentences = (s for text in texts for s in _sentences(text) if s)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=out, vocab_size=vocab_size, **LOSSLESS | options
        )
    except RuntimeError as error:
        found = re.sub(r"\w+: src/\S+ \[.*?\] ", "", str(error))
        raise ValueError(f"sentencepiece cannot train vocab_size={vocab_size} on this text: {found}") from error
    return out.getvalue()
