"""Examples:

  jaxlm convert runs/quickstart exported/            a run's newest checkpoint as a Hugging Face folder
  jaxlm convert runs/lora exported/                  a run of adapters, merged into its base
  jaxlm convert runs/lora adapters/ --adapters       the adapters alone, as `peft` loads them
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
    parser.add_argument("--adapters", action="store_true", help="of a run of adapters, these alone, in peft's format")
    parser.add_argument("--family", help="the model_type to write (default: the plainest that fits)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="gigabytes per file (default 5)")


def main(args: argparse.Namespace) -> int:
    """Writes the Hugging Face folder."""
    configure(Runtime())
    import jax.numpy as jnp

    from jaxlm.models import hf, hf_lora
    from jaxlm.models.decoder import spec
    from jaxlm.models.spec import count
    from jaxlm.recipes.load import load_adapters, load_model

    if args.adapters:
        found = load_adapters(args.source, step=args.step)
        hf_lora.save(args.destination, found.params, found.lora, found.cfg, family=args.family, base_model=found.base)
        print(f"{found.origin} -> {args.destination}: adapters of rank {found.lora.rank}")
        return 0

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
