"""Reasoning sentence by sentence with Llama 3.1 8B and adapters, on a pod. Run shrunk only, never on a pod.

    jaxlm train --config configs/sentence_by_sentence/llama_pod.py:DATA --config.init_from=path/to/llama
    jaxlm train --config configs/sentence_by_sentence/llama_pod.py --config.data.tokenizer=bytes --shrink

The first on every host, the second on a laptop. DATA has train.jsonl, validation.jsonl and test.jsonl, rows {question,
steps, answer}; without it pairs of states are drawn from Blocksworld with seven blocks.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import preset


def get_config(data: str = "") -> ConfigDict:
    """On 64 chips: parameters and rows split over fsdp=64, eight rows a chip."""
    config = ConfigDict()
    config.recipe = "sentence_by_sentence"
    config.run_dir = "runs/llama_sentences"
    config.init_from = "llama"
    config.model = dataclasses.asdict(preset("llama-3.1-8b", dtype="bfloat16", remat="full", max_length=1024))
    config.data = dict(
        task="jsonl" if data else "blocksworld", tokenizer="llama", batch_size=512, max_steps=16, max_step_tokens=48,
        max_question_tokens=256,
    )  # fmt: skip
    if data:
        for part in ("train", "validation", "test"):
            config.data[part] = dict(kind="jsonl", path=f"{data}/{part}.jsonl")
    else:
        config.data.update(num_blocks=7, num_samples=9_900, num_validation=300, num_test=380)
    config.num_sentences = 16
    config.lora = dict(rank=256, alpha=1024.0)
    config.mesh = dict(fsdp=64)
    config.sparse_core = True
    config.stages = dict(
        cot=dict(num_steps=400, learning_rate=1e-5, warmup_steps=40),
        contextual=dict(num_steps=1000, learning_rate=1e-4, warmup_steps=100),
    )
    config.latents = [dict(name="latent", vectors="contextual", num_steps=4000, learning_rate=1e-4, warmup_steps=300)]
    return config
