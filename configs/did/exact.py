"""Differential information in DPO (arXiv:2505.23761): experiments E1 to E10 on enumerated responses.

    jaxlm train --config configs/did/exact.py
    jaxlm train --config configs/did/exact.py --config.experiments="('e1', 'e8')"
    jaxlm train --config configs/did/exact.py --config.experiments="('e10',)" --config.settings.num_language_seeds=3

Cost: a few minutes on two CPU cores, no experiment above two; no download. Every check should pass; run_dir/table.md
holds the measured numbers beside the expected ones, run_dir/e1.png to e10.png the plots.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The reference settings, at which all figures are judged."""
    config = ConfigDict()
    config.recipe = "did"
    config.run_dir = "runs/did"
    return config
