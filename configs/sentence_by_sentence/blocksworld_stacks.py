"""`blocksworld.py` asked in few words: the stacks of both states, each from the table up, and one latent.

    jaxlm train --config configs/sentence_by_sentence/blocksworld_stacks.py

What a latent saves is the reasoning's tokens; everybody reads the question. Said block by block ("A on the table, B on
A, …") the question is 41 tokens, said by stacks ("A B, …") 17: the same 5,256 pairs, the same plans. What came out is
in README.md beside this file.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config() -> ConfigDict:
    """A model of 0.2M parameters; every stage takes minutes."""
    config = load_config(str(Path(__file__).parent / "blocksworld.py"))
    config.run_dir = "runs/blocksworld_stacks"
    config.data.wording = "stacks"
    config.data.max_question_tokens = 24
    config.stages = {name: config.stages[name] for name in ("direct", "cot", "contextual")}
    config.latents = config.latents[:1]
    config.curricula = ()
    return config
