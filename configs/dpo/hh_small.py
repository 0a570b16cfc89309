"""DPO on pairs in the form of hh-rlhf, from a model that `configs/dpo/hh_sft.py` has fine-tuned on the chosen replies.

    jaxlm tokenizer --jsonl pairs.jsonl.gz --text-field chosen --vocab-size 4096 --heldout-share 0.1 \\
        --out runs/hh_tokenizer
    jaxlm train --config configs/dpo/hh_sft.py:pairs.jsonl.gz
    jaxlm train --config configs/dpo/hh_small.py:pairs.jsonl.gz

pairs.jsonl.gz: a pair per line, {"chosen": …, "rejected": …}, whole conversations marked by "\\n\\nHuman:" and
"\\n\\nAssistant:". A tenth of the pairs is held out. Any other shape of `jaxlm.data.preference` will do.
"""

from ml_collections import ConfigDict


def get_config(pairs: str = "pairs.jsonl.gz") -> ConfigDict:
    """Two epochs of about 1,500 pairs, packed into rows of 1,024 tokens."""
    config = ConfigDict()
    config.recipe = "dpo"
    config.run_dir = "runs/hh_dpo"
    config.init_from = "runs/hh_sft"
    config.model = dict(  # that of hh_sft.py
        vocab_size=4096, width=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384,
        max_length=1024, tie_embeddings=True,
    )  # fmt: skip
    source = dict(kind="jsonl", path=pairs, heldout_share=0.1)
    config.data = dict(
        tokenizer="runs/hh_tokenizer/tokenizer.model",
        train=[dict(source, part="train", name="train")],
        heldout=[dict(source, part="heldout", name="heldout")],
        examples="pairs",
        packing="pack",
        sequence_length=1024,
        batch_size=4,
        bad_rows="skip",
        overlong="truncate",
        epochs=2,
    )
    config.losses = [dict(name="dpo", options=dict(beta=0.1))]
    config.reference = "cached"
    config.optim = dict(name="adamw", learning_rate=1e-4, warmup_steps=10, weight_decay=0.0, schedule="cosine")
    config.train = dict(num_steps=120, eval_every=30, log_every=10, best_metric="heldout/loss", best_mode="min")
    return config
