"""STS12 to STS16, STS-B and SICK-R of a pretrained encoder, by SentEval's protocol "all".

    jaxlm eval --config configs/eval/sts.py --config.model=path/to/all-MiniLM-L6-v2 --config.sts=data/sts

Cost: about a minute per 10,000 pairs with six layers of width 384 on two cores. Unset paths leave their tasks out.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """sts: a folder of 2012 … 2016 with <subset>.test.tsv; stsb: stsb-en-test.csv; sick: SICK_test_annotated.txt."""
    config = ConfigDict()
    config.recipe = "sts"
    config.run_dir = "runs/sts"
    config.model = "all-MiniLM-L6-v2"
    config.sts = config_dict.placeholder(str)
    config.stsb = config_dict.placeholder(str)
    config.sick = config_dict.placeholder(str)
    return config
