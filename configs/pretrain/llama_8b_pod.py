"""Pretraining Llama 3.1 8B on a pod: 8.0B parameters, 4M tokens a step, parameters and optimizer split over all chips.

    jaxlm train --config configs/pretrain/llama_8b_pod.py:corpus/*.jsonl.gz                  the same on every host
    jaxlm train --config configs/pretrain/llama_8b_pod.py:few.jsonl --config.data.tokenizer=bytes --shrink
                                                                     the same shape, in seconds, on a laptop's CPU

The corpus: a document per line, {"text": …}. The tokenizer: a Hugging Face folder with its tokenizer.json (jaxlm[hf]).

Cost: 6 x 7.5B parameters in products x 4.2M tokens = 1.9e17 FLOP a step, about 10 s on 128 chips of 459 TFLOP/s at a
third of their peak. That is arithmetic: this config has been run shrunk, and never on a pod.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import preset


def get_config(corpus: str = "corpus/*.jsonl.gz") -> ConfigDict:
    """On 128 chips: rows split over fsdp=128, 4 micro-batches of a row each per chip."""
    config = ConfigDict()
    config.recipe = "lm"
    config.run_dir = "runs/llama_8b"
    config.model = dataclasses.asdict(preset("llama-3.1-8b", dtype="bfloat16", remat="full", max_length=8192))
    source = dict(kind="jsonl", path=corpus, heldout_share=0.01)
    config.data = dict(
        tokenizer="tokenizer",
        train=[dict(source, part="train", name="train")],
        heldout=[dict(source, part="heldout", name="heldout")],
        sequence_length=8192,
        batch_size=512,
        cache_dir="runs/corpus_cache",
    )
    config.optim = dict(name="adamw", learning_rate=3e-4, warmup_steps=2000, schedule="cosine")
    config.train = dict(num_steps=50_000, num_microbatches=4, z_loss=1e-4, eval_every=1000, checkpoint_every=500)
    config.train.sparse_core = True  # collectives beside the products, and scatters that stay scatters
    config.mesh = dict(fsdp=128)
    return config
