"""FLOPs of both ways of answering, against the figures that were published for GPT-2."""

from __future__ import annotations

import pytest

from jaxlm.analysis.sentence_flops import continuous, discretized, token_by_token
from jaxlm.models.config import DecoderConfig

GPT2 = DecoderConfig(
    vocab_size=50257, width=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, mlp_width=3072,
    mlp_gated=False, max_length=1024,
)  # fmt: skip
# Tokens of the question, tokens written, sentences, answer tokens; GFLOPs published for the language model and for the
# continuous roll with a classifier (arXiv:2505.22202, tables 3, 8 and 9; the lengths written are estimates).
PUBLISHED = {
    "CSQA": (38.8, 67, 5.6, 4, 25.89, 8.51),
    "ProsQA": (357.0, 50, 4.8, 10, 100.99, 64.02),
    "GSM8K": (56.8, 31, 4.3, 2, 21.45, 10.80),
    "Blocksworld": (146.6, 86, 10.1, 3, 58.69, 26.73),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_figures_are_met_within_three_percent(task):
    question, written, sentences, answer, language, latent = PUBLISHED[task]
    every = token_by_token(GPT2, question=question, written=written, head_at="every") / 1e9
    assert every == pytest.approx(language, rel=0.03)
    found = continuous(GPT2, question=question, sentences=sentences, answer=answer) / 1e9
    assert found == pytest.approx(latent, rel=0.03)


def test_the_saving_shrinks_when_the_head_is_at_the_last_position_alone():
    ratios = {}
    for task, (question, written, sentences, answer, *_) in PUBLISHED.items():
        fair = token_by_token(GPT2, question=question, written=written, head_at="last")
        ratios[task] = fair / continuous(GPT2, question=question, sentences=sentences, answer=answer)
    expected = {"CSQA": 2.70, "ProsQA": 1.14, "GSM8K": 1.60, "Blocksworld": 1.68}
    assert ratios == pytest.approx(expected, rel=0.02)


def test_the_same_head_costs_both_the_same():
    for name, written in (("every", 5.0), ("last", 5.0)):
        language = token_by_token(GPT2, question=10, written=written, head_at=name)
        latent = continuous(GPT2, question=10, sentences=0, answer=written, head_at=name)
        assert latent == pytest.approx(language)


def test_reading_again_what_was_written_costs_more_with_the_question():
    args = dict(question=20, sentences=3, written=24)
    plain, contextual = (discretized(GPT2, **args, contextual=c) for c in (False, True))
    assert contextual - plain == pytest.approx(20 * 0.1699e9, rel=1e-3)
    assert plain > token_by_token(GPT2, question=20, written=24, head_at="last")
