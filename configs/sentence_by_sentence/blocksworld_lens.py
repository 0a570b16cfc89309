"""`blocksworld.py` with six layers and one latent, for SentenceLens: where the answer surfaces.

    jaxlm train --config configs/sentence_by_sentence/blocksworld_lens.py

A model of two layers has no middle. Deeper, it learns in fewer steps. The page of every layer is RUN/lens.html.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config() -> ConfigDict:
    """A model of 0.7M parameters; the stages that the latent starts from, and it."""
    config = load_config(str(Path(__file__).parent / "blocksworld.py"))
    config.run_dir = "runs/blocksworld_lens"
    config.model.num_layers = 6
    config.stages = {name: config.stages[name] for name in ("cot", "contextual")}
    config.latents = config.latents[:1]
    for stage, num_steps in ((config.stages.cot, 1500), (config.stages.contextual, 700), (config.latents[0], 1800)):
        stage["num_steps"], stage["warmup_steps"] = num_steps, 100
    config.evals = 2
    config.curricula = ()
    return config
