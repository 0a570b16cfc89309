"""Weights & Biases as a further place for metrics; only with `train.wandb_project`, and the package wandb installed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WandbSink:
    """A sink of metrics that goes on with the same W&B run, found by the folder's path, when a run is started again.

    project: of W&B; config: what stands beside the curves. Where there is no network, WANDB_MODE=offline keeps all
    under `run_dir`/wandb for `wandb sync`.
    """

    def __init__(self, project: str, run_dir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"train.wandb_project={project!r} needs the package: pip install wandb") from error
        path = Path(run_dir).resolve()
        self._run = wandb.init(
            project=project, name=path.name, dir=str(path), config=dict(config), resume="allow",
            id=hashlib.sha256(str(path).encode()).hexdigest()[:16],
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a line."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing to do: a thread of W&B sends on."""

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()
