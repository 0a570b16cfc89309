"""Examples:

  jaxlm show --config configs/quickstart.py                 the first batch: segments, counts, trained spans in ⟦ ⟧
  jaxlm show --config configs/quickstart.py --step 100 --rows 2
  jaxlm show --config configs/quickstart.py --tokens --limit 40    one row as a table, a line per token

What is printed is the very batch that training would see at that step, built by the same code.
"""

from __future__ import annotations

import argparse

from jaxlm.recipes.train import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm show`."""
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a Python file with get_config()")
    parser.add_argument("--step", type=int, default=0, help="the step whose batch is shown (default 0)")
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch (default 4)")
    parser.add_argument("--tokens", action="store_true", help="the first of the rows as a table, a line per token")
    parser.add_argument("--limit", type=int, help="with --tokens: that many lines")
    parser.add_argument("--width", type=int, default=400, help="characters of text per segment (default 400)")


def main(args: argparse.Namespace) -> int:
    """Prints the batch of a step."""
    from jaxlm.data import pipeline
    from jaxlm.data.config import DataConfig
    from jaxlm.data.show import render_batch, render_tokens
    from jaxlm.data.tokenizer import load_tokenizer

    _, cfg = load_recipe(args.config, args.overrides)
    if not isinstance(getattr(cfg, "data", None), DataConfig):
        raise ValueError(
            f"--config {args.config}: jaxlm show prints batches of text (recipes lm and dpo); the recipe "
            f"{getattr(cfg, 'recipe', '?')!r} shows an example when it starts: jaxlm train --config … --shrink"
        )
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    data = pipeline.build(cfg.data, tokenizer)
    if not 0 <= args.step < data.train.num_steps:
        raise ValueError(f"--step {args.step}: the data gives the steps 0 to {data.train.num_steps - 1}")
    batch = data.train.batch(args.step)
    print(
        f"step {args.step} of {data.train.num_steps:,} that the data gives; left out: {dict(data.skipped) or 'nothing'}"
    )
    for row, made_of in enumerate(data.train.indices(args.step)[: args.rows]):
        print(f"row {row} is {made_of['data']} row {made_of['row']}: {'; '.join(made_of['origins'])}")
    shown = render_tokens(batch, tokenizer, limit=args.limit) if args.tokens else None
    print(shown or render_batch(batch, tokenizer, rows=args.rows, width=args.width))
    return 0
