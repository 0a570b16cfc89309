"""`llama_8b_pod.py` with a context of 128k tokens: a row lies on 16 chips, which exchange keys and values.

    jaxlm train --config configs/pretrain/llama_8b_128k_pod.py:corpus/*.jsonl.gz             the same on every host

As many tokens a step as there, in 32 rows. It has been compiled for a pod (`jaxlm plan`) and run shrunk, never on one.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config(corpus: str = "corpus/*.jsonl.gz") -> ConfigDict:
    """On 128 chips: rows split over fsdp=8, each over sequence=16, in 4 micro-batches of a row for every 16 chips."""
    config = load_config(f"{Path(__file__).parent / 'llama_8b_pod.py'}:{corpus}")
    config.run_dir = "runs/llama_8b_128k"
    config.model.max_length = config.data.sequence_length = 131_072
    config.data.batch_size = 32
    config.mesh = dict(fsdp=8, sequence=16)
    return config
