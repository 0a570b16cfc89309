"""Differential information in DPO on real text, experiment E11: three seeds of fine-tuning, DPO and measurements.

    jaxlm train --config configs/did/text.py:pairs.jsonl.gz

pairs.jsonl.gz: a pair per line, {"chosen": …, "rejected": …}, as in `configs/dpo/hh_small.py`; 80 % train, 10 % select,
10 % test. Cost and figures: see the README's table. run_dir holds table.md, results.json and did_text.png.
"""

from ml_collections import ConfigDict


def get_config(pairs: str = "pairs.jsonl.gz") -> ConfigDict:
    """Models of 1M parameters, without pretraining."""
    config = ConfigDict()
    config.recipe = "did_text"
    config.run_dir = "runs/did_text"
    config.pairs = pairs
    return config
