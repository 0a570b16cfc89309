r"""Supervised sentence vectors: a small encoder from scratch on the scored pairs of STS-B, by CoSENT.

    jaxlm train --config configs/simcse/sup.py:DATA
    jaxlm train --config configs/simcse/sup.py:DATA --config.loss=angle
    jaxlm train --config configs/simcse/sup.py:DATA --config.model=None --config.data.tokenizer=None \
        --config.init_from=path/to/all-MiniLM-L6-v2 --config.optim.learning_rate=2e-5 --config.optim.warmup_steps=10 \
        --config.train.num_steps=90 --config.train.eval_every=45 --config.train.checkpoint_every=45

DATA: a folder with stsb/stsb-en-{train,dev}.csv (`jaxlm.evals.sts` says where they can be had).

About 40 minutes on one core from scratch. Measured (dev Spearman, the best checkpoint): from scratch 78.4 and 77.9 with
seeds 0 and 1, where TF-IDF of words has 75.3 and of characters 76.8; after 400 steps 78.2 and 76.7, half as wide then
76.6 and 76.4, with bpe:8000 then 74.9, bpe:2000 75.7; from all-MiniLM-L6-v2 87.3 after 45 steps.

The paper's settings (Gao et al. 2021, arXiv:2104.08821, appendix A) are of triples: data.examples="tuples",
data.fields=("sent0", "sent1", "hard_neg"), score_field=None, loss="simcse", three epochs of NLI, batch_size=512,
learning_rate=5e-5 (BERT and RoBERTa base; large models 1e-5), max_tokens=32, pooling="cls", train_head=True,
temperature=0.05, hard_negative_weight=1.
"""

from ml_collections import ConfigDict


def get_config(data: str = "data") -> ConfigDict:
    """38,400 pairs: nearly seven times the 5,749 that there are."""
    config = ConfigDict()
    config.recipe = "simcse"
    config.run_dir = "runs/simcse_sup"
    config.model = dict(vocab_size=1000, width=1024, num_layers=1, num_heads=16, mlp_width=512, max_length=64)
    config.data = dict(
        train=[
            dict(kind="csv", path=f"{data}/stsb/stsb-en-train.csv", columns=("first", "second", "score"), name="stsb")
        ],
        fields=("first", "second"),
        examples="tuples",
        score_field="score",
        tokenizer="bpe:1000",
        max_tokens=64,
        batch_size=64,
        epochs=8,
    )
    config.loss = "cosent"
    config.dropout = 0.1
    config.dev = f"{data}/stsb/stsb-en-dev.csv"
    config.optim = dict(name="adamw", learning_rate=5e-4, warmup_steps=50, weight_decay=0.1, schedule="linear")
    config.train = dict(
        num_steps=600, eval_every=100, checkpoint_every=100, log_every=20, best_metric="dev/spearman", best_mode="max"
    )
    return config
