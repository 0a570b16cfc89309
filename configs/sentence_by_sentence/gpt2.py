"""Reasoning sentence by sentence with GPT-2 small on one of the paper's four tasks, on one GPU. Not measured yet.

    jaxlm train --config configs/sentence_by_sentence/gpt2.py:blocksworld --config.init_from=path/to/gpt2
    jaxlm train --config configs/sentence_by_sentence/gpt2.py:gsm8k:DATA --config.init_from=path/to/gpt2

init_from: a Hugging Face folder with GPT-2's weights and tokenizer (jaxlm[hf]). blocksworld and prosqa are generated;
gsm8k and csqa are read from DATA/train.jsonl, validation.jsonl and test.jsonl: for gsm8k the released rows (question,
answer with <<a=b>>), for csqa {question, steps, answer}.

Epochs, rates and batches are those of the paper's table 10 (arXiv:2505.22202), batches read as global; the schedules
are ours (linear; the paper's latents have a cosine).
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import preset

# Of each task: samples to train on, and (epochs, rate, batch) of cot, semantic, contextual and latent stages.
TASKS = {
    "gsm8k": (6_843, (20, 1e-4, 64), (3, 5e-4, 256), (30, 5e-4, 128), (200, 5e-4, 128)),
    "csqa": (8_500, (20, 1e-4, 64), (5, 5e-4, 512), (50, 5e-4, 128), (300, 5e-4, 128)),
    "prosqa": (17_886, (20, 1e-4, 64), (3, 5e-4, 128), (50, 5e-4, 96), (50, 5e-4, 32)),
    "blocksworld": (9_900, (100, 1e-4, 64), (100, 1e-4, 1024), (50, 1e-4, 64), (200, 5e-4, 64)),
}
SAME_BATCH = 128
GENERATED = {"prosqa": dict(num_nodes=23, num_test=500), "blocksworld": dict(num_blocks=7, num_test=380)}
LONGEST = {"gsm8k": (12, 24, 192), "csqa": (16, 48, 128), "prosqa": (8, 24, 512), "blocksworld": (14, 16, 192)}


def get_config(arg: str = "blocksworld") -> ConfigDict:
    """arg: TASK, or TASK:FOLDER of its files."""
    task, _, folder = arg.partition(":")
    if task not in TASKS:
        raise ValueError(f"expected one of {', '.join(TASKS)}, found {task!r}")
    size, *stages = TASKS[task]
    steps, step_tokens, question_tokens = LONGEST[task]
    config = ConfigDict()
    config.recipe = "sentence_by_sentence"
    config.run_dir = f"runs/gpt2_{task}"
    config.init_from = "gpt2"
    config.model = dataclasses.asdict(preset("gpt2"))
    config.data = dict(
        task=task, tokenizer="gpt2", batch_size=SAME_BATCH, max_steps=steps, max_step_tokens=step_tokens,
        max_question_tokens=question_tokens,
    )  # fmt: skip
    if task in GENERATED:
        config.data.update(GENERATED[task] | dict(num_samples=size, num_validation=300))
    else:
        config.data.task = "gsm8k" if task == "gsm8k" else "jsonl"
        for part in ("train", "validation", "test"):
            config.data[part] = dict(kind="jsonl", path=f"{folder or 'data'}/{part}.jsonl")
    cot, semantic, contextual, latent = (_stage(size, *stage) for stage in stages)
    config.num_sentences = steps
    config.lens = 8
    config.stages = dict(
        direct=cot, cot=cot, semantic=semantic, contextual=contextual | dict(warmup_steps=100),
        contrastive=contextual | dict(warmup_steps=100),
    )  # fmt: skip
    latent = latent | dict(warmup_steps=300)
    config.latents = [
        latent | dict(name="latent", vectors="contextual"),
        latent | dict(name="latent-paper", vectors="contextual", weights=dict(nll=1.0, info_nce=1.0, stop=1.0)),
        latent | dict(name="latent-contrastive", vectors="contrastive"),
        latent | dict(name="latent-semantic", vectors="semantic"),
        latent | dict(name="latent-hybrid", vectors="semantic", decoder="contextual"),
    ]
    config.curricula = [
        dict(name="coconut", num_stages=steps - 1, num_steps=5 * size // SAME_BATCH, learning_rate=1e-4),
        dict(name="pause", kind="pause", num_stages=steps - 1, num_steps=5 * size // SAME_BATCH, learning_rate=1e-4),
    ]
    return config


def _stage(size: int, epochs: int, rate: float, batch: int) -> dict:
    """As many samples as the paper's epochs have, in batches of one size; the rate by the root of the batch."""
    return dict(num_steps=-(-epochs * size // SAME_BATCH), learning_rate=rate * (SAME_BATCH / batch) ** 0.5)
