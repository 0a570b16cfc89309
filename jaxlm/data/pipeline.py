"""From a data config to loaders: open, encode, keep as a corpus, plan rows."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxlm.data.config import DataConfig
from jaxlm.data.corpus import TokenCorpus
from jaxlm.data.document import Document
from jaxlm.data.encode import Encoder
from jaxlm.data.errors import BadRow
from jaxlm.data.fit import OVERLONG, Group, fit
from jaxlm.data.loader import Loader, Rows
from jaxlm.data.packing import Plan, StreamPlan, pack, pad
from jaxlm.data.preference import encode_pair, encode_response, with_mismatched
from jaxlm.data.sources import SourceConfig, describe, open_source
from jaxlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What `build` returns: the training loader, the held-out rows by name, and the rows left out, by reason."""

    train: Loader
    heldout: dict[str, Rows]
    skipped: collections.Counter[str]
    fingerprint: str

    def map_rows(self, change: Callable[[Rows], Rows]) -> Datasets:
        """The same data with every `Rows` changed, in training and held out."""
        train = self.train.with_sources([change(rows) for rows in self.train.sources])
        return dataclasses.replace(self, train=train, heldout={n: change(rows) for n, rows in self.heldout.items()})

    @property
    def slots(self) -> int:
        """The largest number of segments in any row."""
        return max(rows.most_segments() for rows in self._all())

    @property
    def capacity(self) -> int:
        """The largest number of predicted tokens in any row, up to the next multiple of 64."""
        return -(-max(rows.most_targets() for rows in self._all()) // 64) * 64

    def _all(self) -> list[Rows]:
        return [*self.train.sources, *self.heldout.values()]


def build(cfg: DataConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1) -> Datasets:
    """Reads and tokenises every source, plans its rows, and counts what was left out.

    Raises ValueError (BadRow) at the first bad row unless cfg.bad_rows is "skip".
    """
    skipped: collections.Counter[str] = collections.Counter()
    train = [(read_rows(s, cfg, tokenizer, skipped, training=True), s.weight, cfg.epochs) for s in cfg.train]
    if not train:
        raise ValueError("data.train names no source")
    heldout = {describe(s): read_rows(s, cfg, tokenizer, skipped) for s in cfg.heldout}
    if len(heldout) != len(cfg.heldout):
        raise ValueError("data.heldout: two sources have the same name; set `name` on each")
    loader = Loader(
        train,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        shuffle=cfg.shuffle,
        process_index=process_index,
        process_count=process_count,
    )
    prints = "".join(rows.corpus.fingerprint() for rows in [*loader.sources, *heldout.values()])
    data = Datasets(loader, heldout, skipped, hashlib.sha256(prints.encode()).hexdigest()[:16])
    if not cfg.examples.startswith("responses"):
        return data
    slots = data.slots
    return data.map_rows(lambda rows: rows._replace(slots=slots, extra={"labels": rows.corpus.labels}))


def read_rows(
    source: SourceConfig,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    skipped: collections.Counter[str],
    *,
    training: bool = False,
) -> Rows:
    """One source as planned rows; `skipped` collects what was left out, by reason."""
    corpus = _corpus(source, cfg, tokenizer, skipped)
    if not len(corpus):
        raise ValueError(f"source {describe(source)}: every row was left out: {dict(skipped)}")
    plan = _plan(corpus, cfg, shuffle=training and cfg.shuffle)
    return Rows(corpus, plan, cfg.sequence_length, tokenizer.pad_id, describe(source), cfg.group)


def _plan(corpus: TokenCorpus, cfg: DataConfig, *, shuffle: bool) -> Plan:
    lengths = corpus.num_targets().reshape(-1, cfg.group).sum(axis=1)
    if cfg.packing == "stream":
        # Neighbours in a row should not be neighbours in the source.
        order = np.random.default_rng(cfg.seed).permutation(len(lengths)) if shuffle else None
        return StreamPlan(lengths, cfg.sequence_length, order)
    return pack(lengths, cfg.sequence_length) if cfg.packing == "pack" else pad(lengths)


def _corpus(
    source: SourceConfig, cfg: DataConfig, tokenizer: Tokenizer, skipped: collections.Counter[str]
) -> TokenCorpus:
    if cfg.cache_dir is None:
        return TokenCorpus.from_documents(_documents(source, cfg, tokenizer, skipped))
    inputs = (source, open_source(source).version(), tokenizer.fingerprint(), cfg.sequence_length, cfg.packing,
              cfg.completion_only, cfg.chat_template, cfg.bad_rows, cfg.overlong, cfg.examples)  # fmt: skip
    folder = Path(cfg.cache_dir) / hashlib.sha256(repr(inputs).encode()).hexdigest()[:24]
    counts = folder.with_suffix(".skipped.json")
    if not folder.is_dir():
        left_out: collections.Counter[str] = collections.Counter()
        corpus = TokenCorpus.from_documents(_documents(source, cfg, tokenizer, left_out))
        # Written before the corpus: whoever finds the corpus also finds what is missing from it.
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_suffix(f".{uuid.uuid4().hex}.tmp")
        temporary.write_text(json.dumps(left_out))
        temporary.replace(counts)
        corpus.save(folder)
    skipped.update(json.loads(counts.read_text()))
    return TokenCorpus.load(folder)


def _documents(
    source: SourceConfig, cfg: DataConfig, tokenizer: Tokenizer, skipped: collections.Counter[str]
) -> Iterator[Document]:
    """The documents of every example, one example after another."""
    encode = _encoder(source, cfg, tokenizer)
    opened, title = open_source(source), f"tokenising {describe(source)}"
    rows = tqdm(range(len(opened)), desc=title, unit="row", disable=None, leave=False, delay=1)
    groups = _kept(lambda i: encode(opened[i], opened.origin(i)), rows, cfg, skipped)
    if cfg.examples == "responses_mismatched":
        groups = iter(with_mismatched([group[0] for group in groups]))
    if cfg.packing != "stream":
        groups = _kept(lambda group: fit(group, cfg, skipped), groups, cfg, skipped)
    for group in groups:
        yield from group


def _encoder(source: SourceConfig, cfg: DataConfig, tokenizer: Tokenizer) -> Callable[[Mapping[str, Any], str], Group]:
    """(row, origin) -> the documents of its example."""
    encode = Encoder(
        tokenizer,
        text_field=source.text_field,
        completion_only=cfg.completion_only,
        template=cfg.chat_template,
        prompt_field=source.prompt_field,
        completion_field=source.completion_field,
        messages_field=source.messages_field,
    )
    if cfg.examples == "documents":
        return lambda row, origin: (encode(row, origin),)
    if cfg.examples == "pairs":
        return lambda row, origin: encode_pair(encode, row, origin, source)
    if cfg.examples in ("chosen", "rejected"):
        side = ("chosen", "rejected").index(cfg.examples)
        return lambda row, origin: (encode_pair(encode, row, origin, source)[side],)
    return lambda row, origin: (encode_response(encode, row, origin, source),)


def _kept(
    make: Callable[[Any], Group], items: Iterable[Any], cfg: DataConfig, skipped: collections.Counter[str]
) -> Iterator[Group]:
    """What can be made of the items; bad ones are refused, or counted, as the config says."""
    for item in items:
        try:
            yield make(item)
        except BadRow as error:
            skippable = cfg.overlong if error.reason == OVERLONG else cfg.bad_rows
            if skippable == "refuse":
                raise
            skipped[error.reason] += 1


def texts(source: SourceConfig) -> Iterator[bytes]:
    """The raw text of a source's plain-text rows: what a compressor gets to see. Bad rows are passed over, as in
    training, which counts or refuses them before this is asked for."""
    opened = open_source(source)
    for i in range(len(opened)):
        try:
            yield opened[i][source.text_field].encode()
        except (BadRow, KeyError, AttributeError, UnicodeEncodeError):
            continue
