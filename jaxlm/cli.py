"""The command line: `jaxlm COMMAND --help` teaches each command.

Every command is a module with `add_arguments(parser)` and `main(args)`; it is imported only when it is called, so that
`jaxlm --help` answers at once and a broken optional package breaks one command.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("jaxlm.recipes.train", "train a model from a config file; started again, it resumes"),
    "plan": ("jaxlm.recipes.plan", "whether a config fits a TPU slice, and what bounds it, compiled on this machine"),
    "report": ("jaxlm.recipes.report", "one page about runs: curves, goodput, differences of their configs"),
    "show": ("jaxlm.recipes.show", "print the batches of a config as a person reads them"),
    "generate": ("jaxlm.recipes.generate", "continue prompts with a trained or imported model"),
    "encode": ("jaxlm.recipes.encode", "sentence vectors of texts with a pretrained encoder"),
    "eval": ("jaxlm.recipes.eval", "evaluate a pretrained model from a config file"),
    "tokenizer": ("jaxlm.data.tokenizer_train", "train a sentencepiece tokenizer on any text source"),
    "convert": ("jaxlm.recipes.convert", "between Hugging Face folders and jaxlm runs, both ways"),
    "bench": ("jaxlm.bench.cli", "measure speed and memory on this machine"),
}


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; only `command`'s own arguments are filled in (its module is imported)."""
    parser = argparse.ArgumentParser(prog="jaxlm", description="Train language models in JAX, on a laptop or a pod.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name == command:
            loaded = importlib.import_module(module)
            sub.epilog = loaded.__doc__
            loaded.add_arguments(sub)
            sub.set_defaults(main=loaded.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 for an error the user can mend, or the command's own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in argv if not a.startswith("-")), None)
    args, rest = make_parser(command).parse_known_args(argv)
    args.overrides = _overrides(rest)
    if args.overrides and not hasattr(args, "config"):
        print(f"jaxlm {args.command}: this command takes no --config overrides", file=sys.stderr)
        return 2
    try:
        return args.main(args) or 0
    except ValueError as error:
        # Errors that name what was expected and how to fix it need no stack above them; --debug shows it.
        if getattr(args, "debug", False):
            raise
        print(f"jaxlm {args.command}: error: {error}", file=sys.stderr)
        return 1


def _overrides(rest: Sequence[str]) -> list[str]:
    """`--config.a.b=1` and `--config.a.b 1` as `a.b=1`; anything else is unknown."""
    found, items = [], list(rest)
    while items:
        item = items.pop(0)
        if not item.startswith("--config."):
            print(f"jaxlm: unknown argument {item!r} (overrides are written --config.field=value)", file=sys.stderr)
            raise SystemExit(2)
        if "=" not in item and items:
            item = f"{item}={items.pop(0)}"
        found.append(item.removeprefix("--config."))
    return found


if __name__ == "__main__":
    sys.exit(main())
