"""Examples:

  jaxlm train --config configs/quickstart.py
  jaxlm train --config configs/quickstart.py --config.optim.learning_rate=1e-3 --config.run_dir=runs/fast
  jaxlm train --config configs/pretrain/llama_8b_pod.py:few.jsonl --config.data.tokenizer=bytes --shrink
                                                                      a pod's config, in seconds, on this CPU
  jaxlm train --config configs/dpo/hh_small.py:pairs.jsonl.gz --config.losses.0.options.beta=0.05
                                                                      DPO on pairs; other losses by their name
  jaxlm train --config configs/simcse/unsup.py:DATA --config.temperature=0.1
                                                                      an encoder of sentences, by contrast
  jaxlm train --config configs/quickstart.py --shrink --debug --no-jit    plain Python stepping, for print and pdb

Every field of the config can be set as --config.group.field=value (a Python literal, or a string); an unknown field is
an error that names the nearest ones. A run lives in config.run_dir: run.json (config, versions, mesh, data
fingerprint), metrics.jsonl, TensorBoard events, checkpoints, loss.png. Started again, it resumes where it stopped.
On machines whose disks go with them, --config.train.bucket=gs://name/prefix keeps the checkpoints, and copies of the
small files, in <bucket>/<run_dir> (pip install 'jaxlm[gcs]').
Exit status 75: stopped by a signal, saved, ready to resume.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import jax

from jaxlm.recipes.config import load_config, to_dataclass
from jaxlm.recipes.runtime import Runtime, configure
from jaxlm.recipes.shrink import num_devices
from jaxlm.recipes.shrink import shrink as shrink_model
from jaxlm.train.bucket import Copies, home

NO_KERNELS = "leave token_stats and attention to XLA, without compiled kernels: to see whether one is to blame"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm train`."""
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a Python file with get_config()")
    parser.add_argument(
        "--shrink", action="store_true", help="a small model of the same shape, on simulated CPU devices"
    )
    parser.add_argument("--simulate-devices", type=int, metavar="N", help="N CPU devices in place of the real ones")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="trace the first NaN to its line, refuse implicit transfers and recompilation, check every output, "
        "show stacks of errors",
    )
    parser.add_argument("--no-jit", action="store_true", help="with --debug: no compilation, for print and pdb")
    parser.add_argument("--no-kernels", action="store_true", help=NO_KERNELS)


def main(args: argparse.Namespace) -> int:
    """Runs the recipe that the config names."""
    recipe, cfg = load_recipe(args.config, args.overrides)
    devices = args.simulate_devices
    if args.shrink:
        cfg = shrink(recipe, cfg)
        devices = devices or (num_devices(cfg.mesh) if hasattr(cfg, "mesh") else None)
    bucket = bucket_of(cfg)
    runtime = Runtime(
        simulated_devices=devices, debug=args.debug, jit=not args.no_jit, kernels=not args.no_kernels
    )
    configure(runtime)
    recipe.run(cfg)
    if bucket is not None and jax.process_index() == 0:  # what the recipe has made since the last save, plots and all
        Copies(Path(cfg.run_dir), home(cfg.run_dir, bucket)).update()
    return 0


def bucket_of(cfg: Any) -> str | None:
    """The bucket of a config, if it has one; ValueError where one cannot be reached or is in the wrong place."""
    bucket: str | None = getattr(getattr(cfg, "train", cfg), "bucket", None)
    if "://" in cfg.run_dir:
        raise ValueError(
            f"run_dir: expected a folder of this machine, found {cfg.run_dir}; for a bucket, set train.bucket: "
            "checkpoints go there, and the small files are copied"
        )
    home(cfg.run_dir, bucket)
    return bucket


def shrink(recipe: Any, cfg: Any) -> Any:
    """The config made small by the recipe's own `shrink` where it has one, else by that of models and data."""
    return getattr(recipe, "shrink", shrink_model)(recipe.resolve(cfg))


def load_recipe(path: str, overrides: list[str]) -> tuple[Any, Any]:
    """The recipe's module (Config, resolve, run; shrink where the general one does not fit), and the typed config."""
    values = load_config(path, overrides)
    recipe = importlib.import_module(f"jaxlm.recipes.{values.get('recipe', 'lm')}")
    return recipe, to_dataclass(recipe.Config, values)
