"""Examples:

  jaxlm eval --config configs/eval/sts.py --config.model=path/to/all-MiniLM-L6-v2 --config.sts=data/sts
  jaxlm eval --config configs/eval/sts.py --config.model=… --config.stsb=data/stsb-en-test.csv

Evaluates a pretrained model. The config names the evaluation (its recipe), the model and the files; config.run_dir gets
the table and the figures as JSON.
"""

from __future__ import annotations

import argparse

from jaxlm.recipes.runtime import Runtime, configure
from jaxlm.recipes.train import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm eval`."""
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a Python file with get_config()")


def main(args: argparse.Namespace) -> int:
    """Runs the evaluation that the config names."""
    configure(Runtime())
    recipe, cfg = load_recipe(args.config, args.overrides)
    recipe.run(cfg)
    return 0
