"""Decoders as encoders of sentences, against transformers and sentence-transformers, on tiny random models."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from jaxlm.evals.encode import Encoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"]
TEXTS = ["a b c d e f g h a b c d", "", "h g", "a " * 40, "b c a"]
SIZES = dict(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, intermediate_size=24, max_position_embeddings=20, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)  # fmt: skip
MADE = {
    # A language model's folder: its unembedding is there, under a prefix, and is no part of an encoder.
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)),
    # Embedding models' folders: no prefix, no unembedding, whatever their configs say of tied ones.
    "mistral": lambda: transformers.MistralModel(transformers.MistralConfig(**SIZES, sliding_window=4)),
    "qwen2": lambda: transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3Model(transformers.Qwen3Config(**SIZES)),
    "gemma3": lambda: transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**SIZES, sliding_window=4)),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    ),
}


def make_tokenizer(template="<s> $A", **names):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [(token, WORDS.index(token)) for token in ("<s>", "</s>")]
    made.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    plain = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=20, **plain | names)


def write(folder, family, **tokenizer):
    torch.manual_seed(0)
    model = MADE[family]().eval()
    for parameter in model.parameters():  # larger than at the start, so that vectors differ by far more than rounding
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    make_tokenizer(**tokenizer).save_pretrained(folder)
    return model.base_model


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in [*MADE][1:])])
def test_every_family_has_the_states_of_transformers(tmp_path, family):
    model = write(tmp_path, family, pad_token="<pad>")
    tokenizer = make_tokenizer(pad_token="<pad>")
    for pooling in ("mean", "last"):
        ours = Encoder.load(tmp_path, pooling=pooling)
        found = ours.encode(TEXTS, batch_size=len(TEXTS))
        ours.save(tmp_path / pooling)
        again = Encoder.load(tmp_path / pooling)
        assert (again.cfg, again.pooling, again.max_tokens) == (ours.cfg, pooling, 20)
        jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
        there = transformers.AutoModel.from_pretrained(tmp_path / pooling).eval()
        for text, vector in zip(TEXTS, found):
            ids = tokenizer(text, truncation=True, max_length=20, return_tensors="pt")["input_ids"]
            for theirs in (model, there):
                with torch.no_grad():
                    hidden = theirs(ids).last_hidden_state[0]
                expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
                np.testing.assert_allclose(vector, expected.numpy(), atol=2e-5)


def test_without_a_pooling_it_is_that_of_sentence_transformers(tmp_path):
    for family, pooling in (("llama", "last"), ("qwen3", "mean")):
        write(tmp_path / family, family)
        assert Encoder.load(tmp_path / family).pooling == pooling


def test_a_text_without_any_token_is_zero_beside_others_and_alone(tmp_path):
    write(tmp_path, "qwen3", template="$A")
    for pooling in ("mean", "last"):
        model = dataclasses.replace(Encoder.load(tmp_path, pooling=pooling), unit=True)
        np.testing.assert_array_equal(model.encode(["", "a"])[0], 0)
        np.testing.assert_array_equal(model.encode([""]), 0)


def test_what_is_refused_says_why(tmp_path):
    write(tmp_path / "encoder", "llama")
    with pytest.raises(ValueError, match="'cls' takes the first token's state, and in a causal .* 'last' or 'mean'"):
        Encoder.load(tmp_path / "encoder", pooling="cls")
    with pytest.raises(ValueError, match=f"no config.json; .*that of a run is {tmp_path}/encoder"):
        Encoder.load(tmp_path)
    path = tmp_path / "encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_causal": False}))
    with pytest.raises(ValueError, match="is_causal=False lets tokens see later ones"):
        Encoder.load(tmp_path / "encoder")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sentence_transformers_gives_the_same_vectors(tmp_path, family):
    library = pytest.importorskip("sentence_transformers")
    write(tmp_path / "start", family, template="$A </s>")  # no padding token, as Llama 3
    for pooling, theirs_name in (("mean", "mean"), ("last", "lasttoken")):
        ours = dataclasses.replace(Encoder.load(tmp_path / "start", pooling=pooling), unit=True, max_tokens=12)
        ours.save(tmp_path / pooling)
        theirs = library.SentenceTransformer(str(tmp_path / pooling), device="cpu", local_files_only=True)
        expected = theirs.encode(TEXTS)
        assert theirs.max_seq_length == 12 and np.ptp(expected, axis=0).max() > 0.1
        np.testing.assert_allclose(ours.encode(TEXTS), expected, atol=1e-5)
        theirs.tokenizer.padding_side = "left"
        np.testing.assert_allclose(theirs.encode(TEXTS), expected, atol=1e-5)
        # And a folder that it wrote itself.
        modules = library.sentence_transformer.modules
        transformer = modules.Transformer(str(tmp_path / pooling), max_seq_length=10)
        pool = modules.Pooling(transformer.get_embedding_dimension(), pooling_mode=theirs_name)
        made = library.SentenceTransformer(modules=[transformer, pool], device="cpu")
        made.save(str(tmp_path / f"{pooling} of theirs"))
        loaded = Encoder.load(tmp_path / f"{pooling} of theirs")
        assert (loaded.pooling, loaded.unit, loaded.max_tokens) == (pooling, False, 10)
        np.testing.assert_allclose(loaded.encode(TEXTS), made.encode(TEXTS), atol=1e-5)
