"""A preference run so small that it takes seconds, and fixtures that keep it so, for the tests of the recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.data.config import DataConfig
from jaxlm.data.sources import SourceConfig
from jaxlm.models.config import DecoderConfig
from jaxlm.models.lora import LoraConfig
from jaxlm.recipes import dpo, wiring
from jaxlm.sharding.mesh import make_mesh
from jaxlm.train.config import TrainConfig
from jaxlm.train.optim import OptimConfig

MODEL = DecoderConfig(vocab_size=259, width=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=16,
                      mlp_gated=False, rope=None, learned_positions=True, max_length=80, scan_layers=False)  # fmt: skip
LORA = LoraConfig(rank=2)
STEPS = 6


def rows(n: int, seed: int = 0) -> tuple[dict[str, Any], ...]:
    """Ragged pairs whose chosen replies are of a's and whose rejected ones of b's; and such responses with labels."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        chosen, rejected = "a" * rng.integers(1, 9), "b" * rng.integers(1, 9)
        response = {"completion": (chosen, rejected)[i % 2], "label": i % 2 == 0}
        found.append({"prompt": "p" * rng.integers(1, 5) + str(i), "chosen": chosen, "rejected": rejected, **response})
    return tuple(found)


def config(run_dir: Path, **changes: Any) -> dpo.Config:
    # Two pairs are held out: the sum of their losses is not rounded. Rows are longer than their targets' capacity, 64.
    data = dict(
        train=(SourceConfig("memory", rows=rows(60), name="t"),),
        heldout=(SourceConfig("memory", rows=rows(2, seed=1), name="h"),),
        examples="pairs", packing="pack", sequence_length=80, batch_size=8, epochs=9, num_threads=0,
    ) | changes.pop("data", {})  # fmt: skip
    train = dict(num_steps=STEPS, log_every=1, eval_every=1, checkpoint_every=2) | changes.pop("train", {})
    optim = OptimConfig(learning_rate=1e-2, weight_decay=0.0, schedule="constant")
    base = dict(data=DataConfig(**data), train=TrainConfig(**train), optim=optim, model=MODEL)
    return dpo.Config(run_dir=str(run_dir), **base | changes)


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Programs that several runs compile alike are compiled once."""
    chosen = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_enable_compilation_cache": True,  # which a command before in this process turned off for its eight devices
    }
    before = {name: getattr(jax.config, name) for name in chosen}
    for name, value in chosen.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(wiring, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
    monkeypatch.setattr(dpo, "plot_run", lambda *arguments, **options: "none drawn")  # a second of matplotlib
