"""Ten steps of a tiny Llama: the golden curve, and the same numbers under every mesh, micro-batching and remat.

The golden file is written by `python tests/train/test_golden_curve.py`, on one device.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import make_constrain, shard_batch
from jaxlm.train.objectives import make_hidden_nll, make_next_token_loss
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.state import init_state
from jaxlm.train.step import make_train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "ten_steps.json"
CFG = DecoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
ROWS, LENGTH, STEPS = 8, 16, 10


def batch(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32)
    lengths = rng.integers(3, LENGTH, (ROWS, 1))  # ragged: rows weigh differently
    index = np.arange(LENGTH, dtype=np.int32)
    return dict(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        mask=(rng.random((ROWS, LENGTH)) < 0.7) & (index < lengths),
        positions=np.broadcast_to(index, (ROWS, LENGTH)).copy(),
        segments=(index < lengths).astype(np.int32),
        target_bytes=np.ones((ROWS, LENGTH), np.int32),
    )


def curve(mesh_cfg=None, *, num_devices=1, num_microbatches=1, steps=STEPS, **changes):
    """Loss and gradient norm of every step, and the final parameters' norms by path."""
    cfg = dataclasses.replace(CFG, **changes)
    mesh = make_mesh(mesh_cfg or MeshConfig(), jax.devices()[:num_devices])
    spec, constrain = decoder.spec(cfg), make_constrain(mesh)
    # Clipping is off: it would hide a gradient that is off by a factor.
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=2, clip_norm=None, eps=1e-4)
    optimizer, schedule = make_optimizer(optim, num_steps=STEPS, decay_mask=specs.decay_mask(spec))

    def apply(params, tokens, *, positions, segments, key):
        call = dict(positions=positions, segments=segments, key=key, constrain=constrain)
        return decoder.forward(params, tokens, cfg=cfg, **call).hidden

    loss_fn = make_next_token_loss(make_hidden_nll(apply, partial(decoder.head, cfg=cfg), mesh=mesh), z_loss=1e-3)
    step = make_train_step(
        loss_fn,
        optimizer,
        seed=0,
        schedule=schedule,
        num_microbatches=num_microbatches,
        dropout=cfg.dropout > 0,
    )
    step = jax.jit(step, donate_argnums=0)
    state = init_state(jax.random.key(0), spec, optimizer, mesh=mesh)
    out = {"loss": [], "grad_norm": []}
    for i in range(steps):
        state, metrics = step(state, shard_batch(batch(i), mesh))
        out["loss"].append(float(metrics["loss"][0] / metrics["loss"][1]))
        out["grad_norm"].append(float(metrics["grad_norm"][0]))
    norms = {path: float(np.linalg.norm(x)) for path, x in specs.flatten(state.params).items()}
    return {**out, "param_norms": norms}


def assert_same(got, want, tolerance):
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=tolerance)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=tolerance)
    assert got["param_norms"].keys() == want["param_norms"].keys()
    for path, norm in want["param_norms"].items():
        np.testing.assert_allclose(got["param_norms"][path], norm, rtol=tolerance, err_msg=path)


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_one_device_gives_the_golden_curve(golden):
    assert_same(curve(), golden, 1e-5)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(fsdp=2, tensor=2, sequence=2),
    ],
    ids=["data", "fsdp", "data_fsdp_tensor", "fsdp_tensor_sequence"],
)
def test_eight_devices_give_the_golden_curve(golden, mesh):
    assert_same(curve(mesh, num_devices=8), golden, 1e-5)


@pytest.mark.slow
def test_tensor_parallel_alone_gives_the_golden_curve(golden):
    assert_same(curve(MeshConfig(tensor=2), num_devices=2), golden, 1e-5)


def test_micro_batches_give_the_golden_curve(golden):
    assert_same(curve(num_microbatches=4), golden, 1e-5)
    assert_same(curve(MeshConfig(fsdp=2), num_devices=2, num_microbatches=2), golden, 1e-5)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_gives_the_golden_curve(golden, remat):
    assert_same(curve(remat=remat), golden, 1e-5)


def test_unrolled_layers_give_the_golden_curve(golden):
    assert_same(curve(scan_layers=False), golden, 1e-5)


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_split():
    one = curve(dropout=0.2, steps=3)
    assert_same(curve(dropout=0.2, steps=3, num_microbatches=4), one, 1e-5)
    assert_same(curve(MeshConfig(data=4), num_devices=4, dropout=0.2, steps=3), one, 1e-5)
    assert one["loss"] != curve(steps=3)["loss"]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(curve(), indent=1) + "\n")
