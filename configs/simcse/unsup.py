"""Unsupervised SimCSE of a small encoder from scratch, on the sentences of STS: about a minute on two cores.

    jaxlm train --config configs/simcse/unsup.py:DATA

DATA: a folder with sts/20YY/<subset>.test.tsv and stsb/stsb-en-{train,dev}.csv (`jaxlm.evals.sts` says where they can
be had). Sentences of STS-B dev are left out of the training; checkpoints are chosen on it.

The paper's settings (Gao et al. 2021, arXiv:2104.08821, appendix A), for BERT base: init_from="bert-base-uncased",
data of 10^6 sentences (kind="lines"), one epoch, batch_size=64, optim.learning_rate=3e-5, max_tokens=32,
pooling="cls", train_head=True, temperature=0.05, dropout=0.1, evaluated every 125 steps. RoBERTa base: batch_size=512,
learning_rate=1e-5; large models: 64 and 1e-5, 512 and 3e-5.
"""

from ml_collections import ConfigDict

STS = ("2012", "2013", "2014", "2015")


def get_config(data: str = "data") -> ConfigDict:
    """One pass over about 26,000 sentences."""
    config = ConfigDict()
    config.recipe = "simcse"
    config.run_dir = "runs/simcse_unsup"
    config.model = dict(vocab_size=8000, width=128, num_layers=2, num_heads=4, mlp_width=512, max_length=32)
    config.data = dict(
        train=[
            dict(kind="tsv", path=[f"{data}/sts/{year}" for year in STS], columns=("score", "first", "second"),
                 name="sts"),
            dict(kind="csv", path=f"{data}/stsb/stsb-en-train.csv", columns=("first", "second", "score"), name="stsb"),
        ],
        fields=("first", "second"),
        tokenizer="bpe:8000",
        max_tokens=24,
        batch_size=64,
    )  # fmt: skip
    config.temperature = 0.05
    config.dropout = 0.1
    config.dev = f"{data}/stsb/stsb-en-dev.csv"
    config.optim = dict(name="adamw", learning_rate=1e-3, warmup_steps=30, weight_decay=0.0, schedule="linear")
    config.train = dict(
        num_steps=400, eval_every=100, checkpoint_every=100, log_every=20, best_metric="dev/spearman", best_mode="max"
    )
    return config
