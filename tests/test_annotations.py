"""Shapes and dtypes as the signatures state them, checked at every call of real work, in a process of its own."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = [f"jaxlm.{name}" for name in ("ops", "losses", "models")]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["train", "train_on_a_mesh", "generate"])
def test_annotations_hold(work):
    done = subprocess.run([sys.executable, __file__, work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_check_would_find_an_error():
    done = subprocess.run([sys.executable, __file__, "mistake"], capture_output=True, text=True, check=False)
    assert "TypeCheckError" in done.stderr


def _train(**changes) -> None:
    runpy.run_path(str(HERE / "train" / "test_golden_curve.py"))["curve"](steps=1, **changes)


def _train_on_a_mesh() -> None:
    from jaxlm.sharding.mesh import MeshConfig

    _train(mesh_cfg=MeshConfig(fsdp=2, tensor=2), num_devices=4, num_microbatches=2, dropout=0.1, dtype="bfloat16")


def _generate() -> None:
    import jax

    from jaxlm.data.tokenizer import ByteTokenizer
    from jaxlm.generate.sample import SamplingConfig, generate
    from jaxlm.models import decoder
    from jaxlm.models import spec as specs
    from jaxlm.models.config import DecoderConfig

    cfg = DecoderConfig(vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16)
    params = specs.init(jax.random.key(0), decoder.spec(cfg))
    sampling = SamplingConfig(max_new_tokens=4, top_k=5, top_p=0.9, min_p=0.1, num_samples=2)
    assert len(generate(params, ["a", "bcd"], cfg=cfg, sampling=sampling, tokenizer=ByteTokenizer())) == 4


def _mistake() -> None:
    import jax.numpy as jnp

    from jaxlm.losses import seq_logprob

    seq_logprob(jnp.zeros((2, 3)), jnp.zeros((2, 4), bool))


if __name__ == "__main__":
    runpy.run_path(str(HERE / "conftest.py"))  # eight simulated devices
    from jaxtyping import install_import_hook

    install_import_hook(PACKAGES, "beartype.beartype")
    {"train": _train, "train_on_a_mesh": _train_on_a_mesh, "generate": _generate, "mistake": _mistake}[sys.argv[1]]()
