"""`--shrink`: any config, a pod's included, as one of the same shape that runs in seconds on a laptop's CPU.

Same family, layer pattern, losses, packing, sharding axes and code path; fewer and narrower layers, short sequences,
few steps, and every mesh axis longer than one folded to two simulated devices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxlm.data.config import DataConfig
from jaxlm.models.config import DecoderConfig, EncoderConfig, RopeConfig
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.train.config import TrainConfig

HEAD_DIM, MLP_PER_WIDTH, LENGTH, STEPS = 16, 2, 64, 4


def shrink(cfg: Any) -> Any:
    """Shrinks the groups `model`, `data`, `train`, `optim` and `mesh` of a recipe's config; what else it holds stays.

    The run folder gets the suffix `-shrunk`, so that the real run's is never touched, and the parameters are random:
    a shrunk model cannot load the weights of the full one.
    """
    mesh = fold_mesh(cfg.mesh)
    train = shrink_train(cfg.train)
    rows = mesh.slice * (mesh.data or 1) * mesh.fsdp * train.num_microbatches
    return dataclasses.replace(
        cfg,
        run_dir=f"{cfg.run_dir}-shrunk",
        init_from=None,
        model=shrink_decoder(cfg.model),
        data=shrink_data(cfg.data, rows),
        train=train,
        optim=dataclasses.replace(cfg.optim, warmup_steps=min(cfg.optim.warmup_steps, 1)),
        mesh=mesh,
    )


def num_devices(mesh: MeshConfig) -> int:
    """The simulated devices that a folded mesh needs."""
    return mesh.slice * (mesh.data or 1) * mesh.fsdp * mesh.tensor * mesh.sequence


def fold_mesh(mesh: MeshConfig) -> MeshConfig:
    """Every axis of two or more becomes two; `data=None` (the rest of the devices) becomes one."""
    sizes = {f.name: getattr(mesh, f.name) for f in dataclasses.fields(mesh)}
    return MeshConfig(**{name: 1 if size is None else min(size, 2) for name, size in sizes.items()})


def shrink_decoder(cfg: DecoderConfig) -> DecoderConfig:
    """Two layers or one period of the layer pattern plus one, heads of 16, at most 4 query heads."""
    heads = math.gcd(cfg.num_heads, 4)
    kv_heads = max(1, heads * cfg.num_kv_heads // cfg.num_heads)
    kv_heads = max(kv_heads, min(2, cfg.num_kv_heads, heads))  # two shards of the tensor axis stay possible
    width = heads * HEAD_DIM
    return dataclasses.replace(
        cfg,
        width=width,
        num_layers=min(cfg.num_layers, max(2, len(cfg.layer_pattern) + 1)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        mlp_width=MLP_PER_WIDTH * width,
        window=None if cfg.window is None else min(cfg.window, LENGTH // 4),
        rope=_shrink_rope(cfg.rope),
        rope_local=_shrink_rope(cfg.rope_local),
        dtype="float32",
    )


def shrink_encoder(cfg: EncoderConfig) -> EncoderConfig:
    """As `shrink_decoder`."""
    heads = math.gcd(cfg.num_heads, 4)
    return dataclasses.replace(
        cfg, width=HEAD_DIM * heads, num_heads=heads, mlp_width=MLP_PER_WIDTH * HEAD_DIM * heads,
        num_layers=min(cfg.num_layers, max(2, len(cfg.layer_pattern) + 1)), dtype="float32",
    )  # fmt: skip


def _shrink_rope(rope: RopeConfig | None) -> RopeConfig | None:
    if rope is None:
        return None
    pairs = int(HEAD_DIM * rope.rotary_fraction) // 2
    return dataclasses.replace(rope, short_factor=rope.short_factor[:pairs], long_factor=rope.long_factor[:pairs])


def shrink_data(cfg: DataConfig, rows: int) -> DataConfig:
    """Sequences of 64 tokens, examples cut to that, and the smallest batch that the mesh and micro-batches divide."""
    overlong = cfg.overlong if cfg.packing == "stream" else "truncate"
    return dataclasses.replace(
        cfg, sequence_length=min(cfg.sequence_length, LENGTH), batch_size=rows, eval_batch_size=None, overlong=overlong
    )


def shrink_train(cfg: TrainConfig) -> TrainConfig:
    """Four steps, each logged, one evaluation, one checkpoint."""
    return dataclasses.replace(
        cfg,
        num_steps=min(cfg.num_steps, STEPS),
        num_microbatches=min(cfg.num_microbatches, 2),
        log_every=1,
        eval_every=STEPS,
        checkpoint_every=STEPS,
    )
