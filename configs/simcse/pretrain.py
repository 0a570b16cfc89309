"""What SimCSE starts from, in small: an encoder that learns to guess masked words of the sentences of STS.

    jaxlm train --config configs/simcse/pretrain.py:DATA
    jaxlm train --config configs/simcse/ablation.py:DATA        # starts from it

DATA as in unsup.py, which names the sentences and the size of the encoder. About two minutes on two cores. The dev
Spearman falls while it learns, as BERT's is low: guessing words makes the vectors of sentences alike.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.recipes.config import load_config


def get_config(data: str = "data") -> ConfigDict:
    """Four passes over about 26,000 sentences."""
    config = load_config(f"{Path(__file__).parent / 'unsup.py'}:{data}")
    config.run_dir = "runs/simcse_pretrain"
    config.loss = "masked_lm"
    config.model.masked_lm = dict(vocab_bias=True)
    config.data.epochs = 4
    config.train = dict(num_steps=1500, eval_every=500, checkpoint_every=500, log_every=20)
    return config
