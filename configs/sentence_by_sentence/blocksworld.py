"""Reasoning sentence by sentence on Blocksworld with four blocks: all stages on two CPU cores.

    jaxlm train --config configs/sentence_by_sentence/blocksworld.py

All 5,256 pairs of states: 400 for the test, 200 for the choice of checkpoints, the others to train on.
The latents: ours, which ties the scale of what is fed back to that of what was trained on by a squared error, on each
kind of vectors; and on contextual ones the published loss, that without its InfoNCE, a layer norm in the place of the
squared error, and both. What came out is in README.md beside this file. A latent takes five to eight
minutes on two cores, the whole about an hour and a half. Latents and curricula that are added to a config later start
from the stages that are there already: nothing is trained twice.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A model of 0.2M parameters; every stage takes minutes."""
    config = ConfigDict()
    config.recipe = "sentence_by_sentence"
    config.run_dir = "runs/blocksworld"
    config.model = dict(
        vocab_size=340, width=96, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=24, mlp_width=256, max_length=256,
        scan_layers=False,
    )  # fmt: skip
    config.data = dict(
        task="blocksworld", num_blocks=4, tokenizer="sentencepiece:340", max_steps=8, max_step_tokens=12,
        max_question_tokens=64, batch_size=32,
    )  # fmt: skip
    config.num_sentences = 8
    config.stop_cosine = 0.95
    config.lens = 8
    config.stages = dict(
        direct=dict(num_steps=1500, learning_rate=1e-3, warmup_steps=100),
        cot=dict(num_steps=2500, learning_rate=1e-3, warmup_steps=100),
        semantic=dict(num_steps=300, learning_rate=1e-3),
        contextual=dict(num_steps=2500, learning_rate=1e-3, warmup_steps=100),
        contrastive=dict(num_steps=2500, learning_rate=1e-3, warmup_steps=100),
    )
    latent = dict(vectors="contextual", num_steps=4000, learning_rate=1e-3, warmup_steps=300)
    paper = dict(nll=1.0, info_nce=1.0, stop=1.0)
    config.latents = [
        latent | dict(name="latent"),
        latent | dict(name="latent-paper", weights=paper),
        latent | dict(name="latent-norm", weights=paper, unit_scale=True),
        latent | dict(name="latent-semantic", vectors="semantic"),
        latent | dict(name="latent-contrastive", vectors="contrastive"),
        latent | dict(name="latent-hybrid", vectors="semantic", decoder="contextual"),
        latent | dict(name="latent-no-nce", weights=dict(nll=1.0, stop=1.0)),
        latent | dict(name="latent-both", unit_scale=True),
    ]
    thoughts = dict(num_stages=6, num_steps=700, learning_rate=1e-3, warmup_steps=50)
    config.curricula = [thoughts | dict(name="coconut"), thoughts | dict(name="pause", kind="pause")]
    return config
