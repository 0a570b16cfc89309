"""Texts through a ModernBERT folder, against transformers with the same tokenizer, on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from jaxlm.evals.encode import Encoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
CONFIG = dict(vocab_size=12, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
              max_position_embeddings=24, local_attention=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
              cls_token_id=1, sep_token_id=2)  # fmt: skip
TEXTS = ["a b c d e f g h a b c d", "", "h g", "a " * 40]


def make_tokenizer():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def test_texts_have_the_mean_vectors_of_transformers(tmp_path):
    torch.manual_seed(0)
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**CONFIG, attn_implementation="eager")).eval()
    tokenizer = make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    kept = batch["attention_mask"][..., None]
    ours = Encoder.load(tmp_path)
    assert ours.max_tokens == 24
    np.testing.assert_allclose(ours.encode(TEXTS), ((hidden * kept).sum(1) / kept.sum(1)).numpy(), atol=2e-5)
