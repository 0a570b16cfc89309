"""`blocksworld.py`, or another config of this folder, with three seeds, every row of its table with its spread.

    jaxlm train --config configs/sentence_by_sentence/blocksworld_seeds.py
    jaxlm train --config configs/sentence_by_sentence/blocksworld_seeds.py:blocksworld_stacks

The samples of the three parts are the same ones for every seed.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config(name: str = "blocksworld") -> ConfigDict:
    """Three runs, one after another; each can also be started by itself with --config.seed and --config.run_dir."""
    config = ConfigDict()
    config.recipe = "sweep"
    config.run_dir = f"runs/{name}_seeds"
    config.base = load_config(str(Path(__file__).parent / f"{name}.py"))
    config.variants = [dict(name=name, changes=[])]
    config.seed_fields = ["seed"]
    config.metrics = ["accuracy", "solved", "exact", "sentences", "MFLOP, head every", "MFLOP, head last"]
    config.all_rows = True
    return config
