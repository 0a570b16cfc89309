"""Reasoning sentence by sentence on small ProsQA graphs: all stages on two CPU cores. Not measured yet.

    jaxlm train --config configs/sentence_by_sentence/prosqa.py

Graphs of ten nodes, 5,000 to train on, drawn by the algorithm of arXiv:2412.06769, with an exact checker.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A model of 0.9M parameters."""
    config = ConfigDict()
    config.recipe = "sentence_by_sentence"
    config.run_dir = "runs/prosqa"
    config.model = dict(
        vocab_size=400, width=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384,
        max_length=512, scan_layers=False,
    )  # fmt: skip
    config.data = dict(
        task="prosqa", num_nodes=10, num_samples=5000, num_validation=300, num_test=500,
        tokenizer="sentencepiece:400", max_steps=8, max_step_tokens=16, max_question_tokens=256, batch_size=32,
    )  # fmt: skip
    config.num_sentences = 8
    config.lens = 8
    config.stages = dict(
        direct=dict(num_steps=3000, learning_rate=1e-3, warmup_steps=100),
        cot=dict(num_steps=3000, learning_rate=1e-3, warmup_steps=100),
        semantic=dict(num_steps=500, learning_rate=1e-3),
        contextual=dict(num_steps=3000, learning_rate=1e-3, warmup_steps=100),
    )
    latent = dict(num_steps=5000, learning_rate=1e-3, warmup_steps=300)
    config.latents = [
        latent | dict(name="latent", vectors="contextual"),
        latent | dict(name="latent-semantic", vectors="semantic"),
    ]
    return config
