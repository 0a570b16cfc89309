"""The engine against a plain loop over the full forward pass, under refill, stops, samples and streaming."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.generate.engine import next_token_logits
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.models.spec import init

CFG = DecoderConfig(
    vocab_size=259, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_length=64,
    layer_pattern=("local", "global"), window=6, final_soft_cap=5.0,
)  # fmt: skip
TOKENIZER = ByteTokenizer()
PROMPTS = ["a", "The quick brown fox", "xyz", "0123456789", "hello, ", "lambda x: x"]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def params():
    # Large weights make the argmax differ from token to token.
    return jax.tree.map(lambda x: x * 3, init(jax.random.key(1), decoder.spec(CFG)))


def plain_greedy(params, prompt, n):
    """No cache, no batch: the whole sequence anew for every token."""
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    forward = jax.jit(lambda t: decoder.forward(params, t, cfg=CFG).hidden)
    tokens, logprobs, entropies = [], [], []
    for _ in range(n):
        padded = jnp.zeros((1, 48), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        logits = next_token_logits(params, forward(padded)[:, len(ids) - 1], cfg=CFG)[0]
        logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
        token = int(np.argmax(logits))
        ids.append(token)
        tokens.append(token)
        logprobs.append(logp[token])
        entropies.append(-(np.exp(logp) * logp).sum())
        if token == TOKENIZER.eos_id:
            break
    return tokens, logprobs, entropies


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)]
)
def test_greedy_with_refill_equals_the_plain_loop(params, batch_size):
    results = generate(params, PROMPTS, cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER, batch_size=batch_size, chunk=5)
    assert [r.prompt for r in results] == list(range(len(PROMPTS)))
    for result, prompt in zip(results, PROMPTS):
        tokens, logprobs, entropies = plain_greedy(params, prompt, 12)
        assert result.tokens.tolist() == tokens
        np.testing.assert_allclose(result.logprobs, logprobs, atol=2e-5)
        np.testing.assert_allclose(result.entropies, entropies, atol=2e-5)
        assert result.finish_reason == ("end" if tokens[-1] == TOKENIZER.eos_id else "length")


@pytest.mark.slow
def test_samples_do_not_depend_on_batch_size_or_neighbours(params):
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.8, top_k=40, top_p=0.9, num_samples=3, seed=7)
    all_at_once = generate(params, PROMPTS, cfg=CFG, sampling=sampling, tokenizer=TOKENIZER, batch_size=18)
    few = generate(params, PROMPTS, cfg=CFG, sampling=sampling, tokenizer=TOKENIZER, batch_size=5, chunk=3)
    assert [(r.prompt, r.sample) for r in few] == [(i, s) for i in range(6) for s in range(3)]
    for a, b in zip(all_at_once, few):
        assert a.tokens.tolist() == b.tokens.tolist()
    other_seed = generate(
        params, PROMPTS, cfg=CFG, sampling=SamplingConfig(max_new_tokens=8, seed=8), tokenizer=TOKENIZER
    )
    assert other_seed[1].tokens.tolist() != few[3].tokens.tolist()
    assert len({tuple(r.tokens.tolist()) for r in few[:3]}) == 3


def test_stop_string_cuts_text_and_keeps_the_tokens_that_complete_it(params):
    free = generate(params, PROMPTS[1:2], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER)[0]
    stop = TOKENIZER.decode(free.tokens[4:6])
    at = free.text.find(stop)
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0, stop=("never", stop))
    cut = generate(params, PROMPTS[1:2], cfg=CFG, sampling=sampling, tokenizer=TOKENIZER, chunk=4)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[:at]
    assert TOKENIZER.decode(cut.tokens) == free.text[: at + len(stop)]
    assert len(cut.logprobs) == len(cut.entropies) == len(cut.tokens)


def test_an_end_token_ends_a_sample_and_is_not_text(params):
    free = generate(params, PROMPTS[1:2], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER)[0]
    end = int(free.tokens[5])
    first = free.tokens.tolist().index(end)
    result = generate(params, PROMPTS[1:2], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER, eos_ids=(end,))[0]
    assert result.finish_reason == "end"
    assert result.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert result.text == TOKENIZER.decode(free.tokens[:first])


def test_streamed_pieces_add_up_to_the_text(params):
    pieces: dict[int, str] = {}
    sampling = SamplingConfig(max_new_tokens=20, temperature=1.0, stop=("\x00\x01",), num_samples=2)

    def collect(number, text):
        pieces[number] = pieces.get(number, "") + text

    results = generate(params, PROMPTS[:2], cfg=CFG, sampling=sampling, tokenizer=TOKENIZER, chunk=3, on_text=collect)
    assert [pieces.get(i, "") for i in range(4)] == [r.text for r in results]


def test_token_prompts_and_finish_callback(params):
    ids = np.array([TOKENIZER.bos_id, 97], np.int32)
    seen = []
    by_ids = generate(params, [ids], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER, on_finish=seen.append)[0]
    by_text = generate(params, ["a"], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER)[0]
    assert by_ids.tokens.tolist() == by_text.tokens.tolist()
    assert [g.prompt for g in seen] == [0]
    assert generate(params, [], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, found 0"),
        (dict(temperature=-1.0), "temperature must be at least 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], found 0"),
        (dict(min_p=1.5, top_k=0), "top_k must be at least 1, found 0; min_p must be"),
        (dict(stop=("",)), "stop strings must not be empty"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_bad_prompts(params):
    with pytest.raises(ValueError, match="need 65 positions, and the model has max_length=64"):
        generate(params, ["x" * 52], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        generate(params, [np.zeros((0,), np.int32)], cfg=CFG, sampling=GREEDY, tokenizer=TOKENIZER)
