"""Examples:

  jaxlm convert runs/quickstart exported/            a run's newest checkpoint as a Hugging Face folder
  jaxlm convert path/to/hf_folder copy/ --dtype bfloat16 --max-shard-gb 2

The way in needs no command: `init_from` of a config and `jaxlm generate` read Hugging Face folders as they are.
"""

from __future__ import annotations

import argparse

from jaxlm.recipes.runtime import Runtime, configure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm convert`."""
    parser.add_argument("source", help="a run's folder or a Hugging Face folder")
    parser.add_argument("destination", help="the Hugging Face folder to write; must not exist")
    parser.add_argument("--step", type=int, help="a run's checkpoint (default: the newest)")
    parser.add_argument("--family", help="the model_type to write (default: the plainest that fits)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="gigabytes per file (default 5)")


def main(args: argparse.Namespace) -> int:
    """Writes the Hugging Face folder."""
    configure(Runtime())
    import jax.numpy as jnp

    from jaxlm.models import hf
    from jaxlm.models.decoder import spec
    from jaxlm.models.spec import count
    from jaxlm.recipes.load import load_model

    model = load_model(args.source, step=args.step)
    hf.save(
        args.destination,
        model.params,
        model.cfg,
        family=args.family,
        dtype=None if args.dtype is None else jnp.dtype(args.dtype),
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        tokenizer=model.tokenizer,
    )
    print(f"{model.origin} -> {args.destination}: {count(spec(model.cfg)):,} parameters")
    return 0
