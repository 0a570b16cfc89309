"""Pretraining Llama 3.1 70B on a pod: 70.6B parameters, 4M tokens a step. Planned, never run.

    jaxlm plan --config configs/pretrain/llama_70b_pod.py --topology v5p:8x8x8 --no-batch
    jaxlm train --config configs/pretrain/llama_70b_pod.py:corpus/*.jsonl.gz                 the same on every host

The corpus and the tokenizer are those of `llama_8b_pod.py`, and so is all that is not said here.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.models.presets import preset
from jaxlm.recipes.config import load_config


def get_config(corpus: str = "corpus/*.jsonl.gz") -> ConfigDict:
    """On 512 chips, a row each: parameters split over fsdp=64, a plane of the torus, and copied over data=8.

    Over 256 chips and more libtpu makes sums of scatters again, of the widest kernels.
    """
    config = load_config(f"{Path(__file__).parent / 'llama_8b_pod.py'}:{corpus}")
    config.run_dir = "runs/llama_70b"
    config.model = dataclasses.asdict(preset("llama-3.1-70b", dtype="bfloat16", remat="full", max_length=8192))
    config.optim.learning_rate = 1.5e-4
    config.train.num_microbatches = 1
    config.mesh = dict(data=8, fsdp=64)
    return config
