"""A byte-level BPE trained on sentences, as the files of a Hugging Face tokenizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

from jaxlm.data.tokenizer_hf import HFTokenizer

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
"""Special tokens by name, with ids 0, 1, … in this order; a sentence stands between the first and the third."""


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> HFTokenizer:
    """A tokenizer of at most vocab_size ids for encoders: lower case, Unicode form NFKC, bytes for what is rare.

    The same texts give the same tokenizer. (WordPiece of the same library does not: it numbers continuations in the
    order of a hash table.) vocab_size: at least 256 bytes and the special tokens. Needs the extra `hf`.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    except ImportError as error:
        raise ValueError("training a tokenizer needs the extra: pip install 'jaxlm[hf]'") from error

    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise ValueError(f"a byte-level vocabulary needs at least {least} ids, found vocab_size={vocab_size}")
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise ValueError("a tokenizer is trained on texts, and there is none")
    names = list(SPECIAL.values())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=names, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    begin, end = SPECIAL["bos_token"], SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(token, names.index(token)) for token in (begin, end)],
    )  # fmt: skip
    config = SPECIAL | {"cls_token": begin, "sep_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    return HFTokenizer.from_files(
        {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    )
