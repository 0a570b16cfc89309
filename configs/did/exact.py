"""Differential information in DPO (arXiv:2505.23761): experiments E1 to E9 on finite response sets, exact or nearly so.

    jaxlm train --config configs/did/exact.py
    jaxlm train --config configs/did/exact.py --config.experiments="('e1', 'e8')"

Cost: a few minutes on two CPU cores, no experiment above two; no download. Every check should pass; run_dir/table.md
holds the measured numbers beside the expected ones, run_dir/e1.png to e9.png the plots.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The reference settings, at which all figures are judged."""
    config = ConfigDict()
    config.recipe = "did"
    config.run_dir = "runs/did"
    return config
