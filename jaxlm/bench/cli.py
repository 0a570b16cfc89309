"""Examples:

  jaxlm bench imports                     what importing a loss costs beside importing jax
  jaxlm bench token_stats                 the hot path against log_softmax on materialised logits
  jaxlm bench attention                   every implementation of attention against that of jax.nn
  jaxlm bench train --versus torch        a training step against the same model in PyTorch
  jaxlm bench dpo --versus trl            a DPO step against TRL's DPOTrainer, and the peak memory of both
  jaxlm bench encode --model … --texts …  sentence vectors against sentence-transformers
  jaxlm bench latent --versus torch       a step of the sentence-space model against a PyTorch loop
  jaxlm bench pretrain --config …         whole runs against a plain PyTorch loop, in held-out bits per byte
  jaxlm bench pod                         several processes on this machine against one with the same cores
  jaxlm bench chaos --kills 5             a pod on this machine whose processes are killed: the same parameters?

Rivals run in one process, in rotating order; what counts is the ratio of medians. `jaxlm bench NAME --help` for more.
"""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = ("imports", "token_stats", "attention", "train", "dpo", "encode", "latent", "pretrain", "pod", "chaos")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand per benchmark."""
    subparsers = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name in BENCHMARKS:
        module = importlib.import_module(f"jaxlm.bench.{name}")
        summary = (module.__doc__ or "").split("\n")[0]
        sub = subparsers.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(main=module.main)


def main(args: argparse.Namespace) -> int:
    """Unused: each benchmark's own main is called."""
    raise AssertionError(args)
