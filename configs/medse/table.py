"""MED-SE beside plain SimCSE on the same texts, its start and TF-IDF: three seeds each, as a table.

    jaxlm train --config configs/medse/table.py:DATA --config.base.init_from=path/to/all-MiniLM-L6-v2

DATA as in small.py. No checkpoint is chosen: the scores are those of the last step, so that SimCSE may get worse.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config(data: str = "data") -> ConfigDict:
    """Six runs of two to four minutes."""
    config = ConfigDict()
    config.recipe = "sweep"
    config.run_dir = "runs/medse_table"
    config.base = load_config(f"{Path(__file__).parent / 'small.py'}:{data}")
    config.base.train = dict(num_steps=80, eval_every=None, checkpoint_every=None, log_every=20)
    config.variants = [
        dict(
            name="SimCSE on the same texts",
            changes=["definition_weight=0.0", "reworded_weight=0.0", "mask_related=False"],
        ),
        dict(name="MED-SE", changes=[]),
    ]
    config.metrics = ["definitions/recall@1", "definitions/recall@10", "definitions/mrr", "ehr_rel/spearman"]
    config.rows = ["TF-IDF words", "TF-IDF characters", "start"]
    return config
