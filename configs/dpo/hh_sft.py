"""Fine-tuning a small decoder from scratch on the chosen replies of pairs: the reference that DPO starts from.

    jaxlm tokenizer --jsonl pairs.jsonl.gz --text-field chosen --vocab-size 4096 --heldout-share 0.1 \\
        --out runs/hh_tokenizer
    jaxlm train --config configs/dpo/hh_sft.py:pairs.jsonl.gz

pairs.jsonl.gz: see `configs/dpo/hh_small.py`. Prompts are learnt too (completion_only False): there is no pretrained
model below this one. A serious run starts from one, with init_from and completion_only True.
"""

from ml_collections import ConfigDict


def get_config(pairs: str = "pairs.jsonl.gz") -> ConfigDict:
    """1.6M parameters, a few minutes on two cores."""
    config = ConfigDict()
    config.recipe = "lm"
    config.run_dir = "runs/hh_sft"
    config.model = dict(
        vocab_size=4096, width=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384,
        max_length=1024, tie_embeddings=True,
    )  # fmt: skip
    source = dict(kind="jsonl", path=pairs, heldout_share=0.1)
    config.data = dict(
        tokenizer="runs/hh_tokenizer/tokenizer.model",
        train=[dict(source, part="train", name="train")],
        heldout=[dict(source, part="heldout", name="heldout")],
        examples="chosen",
        packing="pack",
        completion_only=False,
        sequence_length=512,
        batch_size=8,
        bad_rows="skip",
        overlong="truncate",
        epochs=20,
    )
    config.optim = dict(name="adamw", learning_rate=3e-3, warmup_steps=30, schedule="cosine")
    config.train = dict(num_steps=300, eval_every=100, log_every=20, best_metric="heldout/loss")
    return config
