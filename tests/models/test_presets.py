"""Presets hold as many parameters as their publishers say."""

from __future__ import annotations

import pytest

from jaxlm.models import decoder
from jaxlm.models.presets import PRESETS, preset
from jaxlm.models.spec import count

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "smollm-135m": 134_515_008,
    "smollm-360m": 361_821_120,
    "smollm-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "phi-3-mini-4k": 3_821_079_552,
}


def test_every_preset_has_a_published_count():
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert count(decoder.spec(preset(name))) == PUBLISHED[name]


def test_unknown_names_and_changes():
    with pytest.raises(ValueError, match=r"unknown preset 'lama-3\.1-8b'; did you mean llama-3\.1-8b"):
        preset("lama-3.1-8b")
    assert preset("llama-3.2-1b", dtype="bfloat16").dtype == "bfloat16"
