"""`blocksworld.py` with eight layers and one latent, for SentenceLens: where the answer surfaces.

    jaxlm train --config configs/sentence_by_sentence/blocksworld_lens.py

A model of two layers has no middle. The page of every layer is RUN/lens.html.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config() -> ConfigDict:
    """A model of 0.9M parameters; the stages that the latent starts from, and it."""
    config = load_config(str(Path(__file__).parent / "blocksworld.py"))
    config.run_dir = "runs/blocksworld_lens"
    config.model.num_layers = 8
    config.stages = {name: config.stages[name] for name in ("cot", "contextual")}
    config.latents = config.latents[:1]
    config.curricula = ()
    config.lens = 24
    return config
