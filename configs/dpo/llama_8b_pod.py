"""DPO of Llama 3.1 8B on a pod, the reference scored once. Planned, never run.

    jaxlm plan --config configs/dpo/llama_8b_pod.py --topology v5e:8x8
    jaxlm train --config configs/dpo/llama_8b_pod.py:pairs.jsonl.gz --config.init_from=path/to/llama

The second the same on every host. pairs.jsonl.gz: {"prompt": …, "chosen": …, "rejected": …} a line; the folder of the
checkpoint holds the tokenizer too (jaxlm[hf]).
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import preset


def get_config(pairs: str = "pairs.jsonl.gz") -> ConfigDict:
    """On 64 chips: parameters and rows split over fsdp=64, a row of packed pairs a chip."""
    config = ConfigDict()
    config.recipe = "dpo"
    config.run_dir = "runs/llama_8b_dpo"
    config.init_from = "llama"
    config.model = dataclasses.asdict(preset("llama-3.1-8b", dtype="bfloat16", remat="full", max_length=4096))
    source = dict(kind="jsonl", path=pairs, heldout_share=0.02)
    config.data = dict(
        tokenizer="llama",
        train=[dict(source, part="train", name="train")],
        heldout=[dict(source, part="heldout", name="heldout")],
        examples="pairs",
        packing="pack",
        sequence_length=4096,
        batch_size=64,
        bad_rows="skip",
        overlong="truncate",
    )
    config.losses = [dict(name="dpo", options=dict(beta=0.1))]
    config.reference = "cached"
    config.optim = dict(name="adamw", learning_rate=5e-7, warmup_steps=50, weight_decay=0.0, schedule="cosine")
    config.train = dict(num_steps=1000, eval_every=200, checkpoint_every=200, log_every=10)
    config.train.sparse_core = True  # where there are some: v5e, which the plan above is for, has none
    config.mesh = dict(fsdp=64)
    return config
