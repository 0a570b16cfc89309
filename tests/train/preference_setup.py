"""Models, ragged packed batches and objectives for the tests of preference training."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import eval_batches
from jaxlm.data.sources import SourceConfig
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.preference_losses import LossTerm, make_pair_values, make_rewards
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.preference import make_pair_objective, make_scorer

BYTES = ByteTokenizer()
CFG = DecoderConfig(vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16,
                    scan_layers=False)  # fmt: skip
SPEC = decoder.spec(CFG)
LENGTH, ROWS = 64, 4


def params_of(seed: int, spec=SPEC) -> dict:
    """Parameters far from their initial values, so that no two responses are alike."""
    rng = np.random.default_rng(seed)
    return specs.map_spec(lambda p: jnp.asarray(0.4 * rng.standard_normal(p.shape), jnp.float32), spec)


def source(n: int, seed: int = 0) -> SourceConfig:
    rng = np.random.default_rng(seed)

    def text(least: int, most: int) -> str:
        return "".join(map(chr, rng.integers(97, 123, rng.integers(least, most))))

    rows = [
        {
            "prompt": text(1, 9), "chosen": text(1, 12), "rejected": text(1, 12),
            "completion": text(1, 12), "label": bool(rng.integers(2)),
        }
        for _ in range(n)
    ]  # fmt: skip
    return SourceConfig("memory", rows=tuple(rows), name=f"m{seed}")


def data_of(examples: str = "pairs", *, n: int = 9, **options) -> pipeline.Datasets:
    base = dict(sequence_length=LENGTH, batch_size=ROWS, packing="pack", examples=examples, num_threads=0)
    return pipeline.build(DataConfig(train=(source(n),), **base | options), BYTES)


def batch_of(data: pipeline.Datasets, rows: int | None = None) -> dict[str, np.ndarray]:
    """All rows of the data in one batch, and one that is empty."""
    return next(iter(eval_batches(data.train.sources[0], batch_size=rows or len(data.train.sources[0].plan) + 1)))


def apply(params, tokens, *, positions, segments, key):
    return decoder.forward(params, tokens, cfg=CFG, positions=positions, segments=segments, key=key).hidden


SCORE = make_hidden_scorer(apply, partial(decoder.head, cfg=CFG))


@pytest.fixture(scope="module")
def packed():
    """data, a batch that holds all of it, and the scores of two models: policy and reference."""
    data = data_of()
    batch = batch_of(data)
    score = jax.jit(make_scorer(SCORE, slots=data.slots), static_argnums=2)
    return data, batch, score, score(params_of(0), batch, None), score(params_of(1), batch, None)


OPTIONS = {
    "cdpo": dict(beta=0.1, label_smoothing=0.1), "robust_dpo": dict(beta=0.1, label_smoothing=0.1),
    "exo": dict(beta=0.1, label_smoothing=1e-3), "discopop": dict(beta=0.1, tau=0.5), "dpo_norm": dict(beta=5.0),
    "simpo": dict(beta=2.0, gamma=0.5), "alphapo": dict(beta=0.5, gamma=0.1, alpha=0.25), "sft": {},
    "aot": dict(beta=0.1, label_smoothing=0.1), "aot_unpaired": dict(beta=0.1),
}  # fmt: skip


def term_of(name: str, **changes) -> LossTerm:
    return LossTerm(name, options=OPTIONS.get(name, dict(beta=0.1)), **changes)


def objective_of(*terms: LossTerm, beta: float = 0.1):
    return make_pair_objective(make_pair_values(terms), rewards=make_rewards(terms), beta=beta)
