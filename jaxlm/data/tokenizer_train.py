"""Examples:

  jaxlm tokenizer --text corpus/ --vocab-size 8000 --out tokenizer/
  jaxlm tokenizer --jsonl docs.jsonl.gz --text-field text --vocab-size 16000 --out tokenizer/

Trains a sentencepiece BPE model that loses nothing: no normalisation, spaces kept as they are, bytes for what it has
not seen. Then `data.tokenizer = "tokenizer/tokenizer.model"` in a config. A hundredth of the rows is left out of the
training and used to report bytes per token.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer import SentencePieceTokenizer

HELDOUT_SHARE = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm tokenizer`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="PATH", help="text files: one, a folder, or a glob")
    source.add_argument("--jsonl", metavar="PATH", help="JSON lines, also .gz and .zst")
    source.add_argument("--stdlib", action="store_true", help="the Python standard library's own sources")
    parser.add_argument("--text-field", default="text", help="the field of a JSON row that is trained on")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=50_000_000, help="text read at most (default 50 MB)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where tokenizer.model is written")


def main(args: argparse.Namespace) -> int:
    """Trains, saves, and reports bytes per token on the rows left out."""
    kind: Literal["text", "jsonl", "stdlib"] = "stdlib" if args.stdlib else "text" if args.text else "jsonl"
    where = dict(kind=kind, path=args.text or args.jsonl, text_field=args.text_field, heldout_share=HELDOUT_SHARE)
    model = train_sentencepiece(
        _texts(SourceConfig(**where, part="train"), args.max_bytes), vocab_size=args.vocab_size
    )
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path = Path(args.out) / "tokenizer.model"
    path.write_bytes(model)
    tokenizer = SentencePieceTokenizer(path)
    print(f"{path}: {tokenizer.vocab_size:,} pieces")
    try:
        heldout = list(_texts(SourceConfig(**where, part="heldout"), args.max_bytes))
    except ValueError:
        print("no row was left out to measure on: the source has too few")
        return 0
    num_bytes = sum(len(t.encode()) for t in heldout)
    num_tokens = sum(len(tokenizer.encode(t)) for t in heldout)
    print(f"{num_bytes / num_tokens:.3f} bytes per token on {len(heldout):,} rows that were left out ({num_bytes:,} bytes)")
    sample = heldout[0][:60]
    print("sample: " + " ".join(repr(tokenizer.decode([i])) for i in tokenizer.encode(sample)))
    return 0


def _texts(source: SourceConfig, max_bytes: int) -> Iterator[str]:
    rows, seen = open_source(source), 0
    for i in range(len(rows)):
        text = rows[i][source.text_field]
        seen += len(text.encode())
        if seen > max_bytes:
            return
        yield text


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """A BPE model, as the bytes of its file, that encodes every text without loss.

    Identity normalisation, no space put before the text, runs of spaces kept, newlines and tabs inside pieces, digits
    one by one, and byte fallback. Ids: 0 unknown, 1 begin, 2 end, 3 padding. Raises ValueError if the texts are too few
    for vocab_size.
    """
    import sentencepiece

    out = io.BytesIO()
    # The trainer reads sentences; lines keep their newline, so that pieces can hold it.
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentence_length=100_000,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece could not train {vocab_size} pieces: {error}; give more text or fewer pieces") from error
    return out.getvalue()
