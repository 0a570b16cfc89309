"""SimCSE's ablations on a small encoder: temperature, dropout, one mask for both views; three seeds each.

    jaxlm train --config configs/simcse/pretrain.py:DATA
    jaxlm train --config configs/simcse/ablation.py:DATA

The start is an encoder that has learnt to guess words, as in the paper (there BERT).
DATA as in unsup.py. The paper's figures (BERT base, STS-B dev): dropout 0, 0.1 and one mask 71.1, 82.5, 43.6;
temperatures 0.001, 0.01, 0.05, 0.1, 1 (supervised) 84.9, 85.4, 86.2, 82.0, 64.0.
Measured (three seeds; the start has 39.7): dropout 0, 0.1, one mask 55.5, 52.2, 54.1; temperatures 0.01, 0.05, 0.1, 1
47.9, 52.2, 49.1, 39.7 (the best checkpoint, which at 1 is the start).
Mean vectors do not collapse without dropout, with twice the steps either (800, seed 0, the last checkpoint): dropout 0,
0.1, one mask have Spearman 58.4, 54.8, 58.8, alignment 0.75, 0.74, 0.71, uniformity -3.7 each. The encoder with random
weights has 56.0: its mean vectors are bags of words, and to push sentences apart leads back to that. dropout.py has the
first token's state, as in the paper, which does collapse.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config(data: str = "data") -> ConfigDict:
    """Eighteen runs of about a minute."""
    config = ConfigDict()
    config.recipe = "sweep"
    config.run_dir = "runs/simcse_ablation"
    config.base = load_config(f"{Path(__file__).parent / 'unsup.py'}:{data}")
    config.base.model, config.base.data.tokenizer = None, None  # those of the start
    config.base.init_from = "runs/simcse_pretrain/encoder"
    config.base.optim.learning_rate = 3e-4
    config.variants = [
        dict(name="temperature 0.05, dropout 0.1", changes=[]),
        dict(name="temperature 0.01", changes=["temperature=0.01"]),
        dict(name="temperature 0.1", changes=["temperature=0.1"]),
        dict(name="temperature 1", changes=["temperature=1.0"]),
        dict(name="dropout 0", changes=["dropout=0.0"]),
        dict(name="one mask", changes=["one_mask=True"]),
    ]
    config.metrics = ["dev/spearman", "dev/alignment", "dev/uniformity"]
    config.rows = ["start", "TF-IDF words", "TF-IDF characters"]
    return config
