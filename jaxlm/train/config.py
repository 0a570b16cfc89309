"""How long a run is, how often it reports, and the settings of its step."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is, how often it reports, and the settings of its step.

    num_steps: updates in all. log_every: steps per metrics line. eval_every, checkpoint_every: steps between, from 0
    on and at the end; None only at the end. keep_last: newest checkpoints kept, beside the one that is best by
    best_metric (None: no best), lowest or highest by best_mode. seed: of initialisation and dropout. num_microbatches:
    parts that a batch is computed in. ema_decay: of the moving average of parameters (None: none is kept). z_loss:
    weight of the squared logsumexp. max_skipped_in_a_row: steps without a finite update after which the run stops.
    stall_s: seconds without a step after which the stacks of all threads are written down, see `jaxlm.train.heartbeat`;
    stall_ends: whether the process then ends, for its launcher to start the run again. bucket: gs://name/prefix, where
    checkpoints go in place of run_dir, for machines whose disks go with them, see `jaxlm.train.bucket`. wandb_project:
    where metrics go too, on Weights & Biases (None: nowhere else). sparse_core: whether the collectives of the step run
    on the SparseCores of TPUs that have them, see `jaxlm.train.sparse_core`.
    """

    num_steps: int
    log_every: int = 10
    eval_every: int | None = 100
    checkpoint_every: int | None = 100
    keep_last: int = 2
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    seed: int = 0
    num_microbatches: int = 1
    ema_decay: float | None = None
    z_loss: float = 0.0
    max_skipped_in_a_row: int = 10
    stall_s: float | None = 1800.0
    stall_ends: bool = False
    bucket: str | None = None
    wandb_project: str | None = None
    sparse_core: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "log_every", "eval_every", "checkpoint_every", "keep_last", "max_skipped_in_a_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        if self.stall_s is not None and not self.stall_s > 0:
            raise ValueError(f"stall_s: expected a positive number of seconds or None, found {self.stall_s}")
