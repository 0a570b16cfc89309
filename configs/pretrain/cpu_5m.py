"""Pretraining a small Llama on a text corpus of your own, on CPU: 5.5M parameters, about 10 minutes on two cores.

    jaxlm tokenizer --jsonl corpus.jsonl.gz --vocab-size 8192 --heldout-share 0.1 --out runs/tokenizer
    jaxlm train --config configs/pretrain/cpu_5m.py:corpus.jsonl.gz

corpus.jsonl.gz: a document per line, {"text": …}; about 10 MB of text fill the run. A tenth of the documents, the
same that the tokenizer did not see, is held out.
"""

from ml_collections import ConfigDict


def get_config(corpus: str = "corpus.jsonl.gz") -> ConfigDict:
    """Four layers of width 256, 2.4M tokens: close to one epoch of 10 MB."""
    config = ConfigDict()
    config.recipe = "lm"
    config.run_dir = "runs/cpu_5m"
    config.model = dict(
        vocab_size=8192, width=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64, mlp_width=768,
        max_length=512, tie_embeddings=True, scan_layers=False,
    )  # fmt: skip
    source = dict(kind="jsonl", path=corpus, heldout_share=0.1)
    config.data = dict(
        tokenizer="runs/tokenizer/tokenizer.model",
        train=[dict(source, part="train", name="train")],
        heldout=[dict(source, part="heldout", name="heldout")],
        sequence_length=512,
        batch_size=8,
        epochs=2,
    )
    config.optim = dict(name="adamw", learning_rate=3e-3, warmup_steps=50, schedule="cosine")
    config.train = dict(num_steps=600, eval_every=None, checkpoint_every=200, best_metric="heldout/bits_per_byte")
    config.baselines = ("zlib", "lzma")
    return config
