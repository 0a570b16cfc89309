"""What a run was: one JSON file in its folder, and the check that a resumed run is the same one."""

from __future__ import annotations

import datetime
import fnmatch
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxlm
from jaxlm.train.bucket import CHECKPOINTS

FILE = "run.json"

MAY_CHANGE = (
    "*num_steps", "*log_every", "*eval_every", "*checkpoint_every", "*keep_last", "*best_metric", "*best_mode",
    "*max_skipped_in_a_row", "*stall_s", "*stall_ends", "*wandb_project", "profile.*",
    "*num_threads", "*cache_dir", "*run_dir", "*bucket", "*sparse_core", "mesh.*", "runtime.*",
)  # fmt: skip
"""Config fields that a resumed run may change, as patterns of dotted names: they alter no earlier number, only what
comes after (how long, how often, where). A schedule that depends on num_steps does go on along its new curve."""

_PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "flax", "optax", "orbax-checkpoint",
    "grain", "tensorflow-datasets", "sentencepiece", "tokenizers", "safetensors",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Version of every package that numbers can depend on, as far as it is installed; and of Python."""
    found = {"python": platform.python_version(), "jaxlm": jaxlm.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_record(
    config: Mapping[str, Any],
    *,
    mesh: jax.sharding.Mesh | None = None,
    data_fingerprint: str | None = None,
    flop_definition: str | None = None,
) -> dict[str, Any]:
    """Everything needed to tell what a run was, as JSON values.

    config: the resolved config, plain nested dicts; data_fingerprint: a digest of the data that the run reads;
    flop_definition: in words, what a FLOP per token counts.
    """
    devices = jax.devices()
    return {
        "config": config,
        "versions": versions(),
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "backend": jax.default_backend(),
            "num_processes": jax.process_count(),
            "num_devices": len(devices),
            "device_kind": devices[0].device_kind,
        },
        "mesh": None if mesh is None else dict(mesh.shape),
        "data_fingerprint": data_fingerprint,
        "flop_definition": flop_definition,
    }


def write_record(run_dir: str | os.PathLike[str], record: Mapping[str, Any], *, step: int) -> Path:
    """Writes `run.json`: the record of this start, and under `earlier` those of the starts before it."""
    path = Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = []
    if step > 0 and path.exists():
        last = json.loads(path.read_text())
        earlier = [*last.pop("earlier", []), last]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"started": now, "from_step": step, **record, "earlier": earlier}, indent=2) + "\n")
    part.replace(path)
    return path


def checkpoints_of(run_dir: str | os.PathLike[str]) -> str:
    """The folder of a run's checkpoints: <run_dir>/checkpoints, unless `run.json` says that they went to a bucket."""
    record = json.loads((Path(run_dir) / FILE).read_text())
    return str(record.get(CHECKPOINTS, Path(run_dir) / CHECKPOINTS))


def check_resumable(
    recorded: Mapping[str, Any], current: Mapping[str, Any], *, may_change: Sequence[str] = MAY_CHANGE
) -> list[str]:
    """Raises ValueError naming every config field that differs and must not; returns the harmless differences.

    >>> check_resumable({"train": {"num_steps": 10}}, {"train": {"num_steps": 20}})
    ['train.num_steps: 10 -> 20']
    """
    old, new = flat(recorded), flat(current)
    absent = "(absent)"
    changed = [name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent)]
    lines = {name: f"{name}: {old.get(name, absent)} -> {new.get(name, absent)}" for name in changed}
    harmless = [name for name in changed if any(fnmatch.fnmatchcase(name, pattern) for pattern in may_change)]
    refused = [lines[name] for name in changed if name not in harmless]
    if refused:
        raise ValueError(
            "the run in this folder was trained with another config (recorded -> now):\n  "
            + "\n  ".join(refused)
            + "\nResume with the recorded values, or start anew in another run folder."
        )
    return [lines[name] for name in harmless]


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted name, as they come back from a file: tuples are lists, keys are strings.

    >>> flat({"train": {"num_steps": 10, "betas": (0.9, 0.95)}})
    {'train.num_steps': 10, 'train.betas': [0.9, 0.95]}
    """
    return dict(_flat(json.loads(json.dumps(tree))))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}{name}.")
    else:
        yield prefix.removesuffix("."), tree
