"""What it costs to import a loss: `import jaxlm.losses` against `import jax` alone, each in fresh processes.

    jaxlm bench imports

The processes take turns; what counts is the ratio of the medians. Bytecode is compiled before the first timed round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from jaxlm.bench.interleave import interleave, medians

STATEMENTS = ("import jax", "import jaxlm.losses")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench imports`."""
    parser.add_argument("--rounds", type=int, default=15, help="processes of each (default 15)")


def main(args: argparse.Namespace) -> int:
    """Times both and prints their ratio."""
    times = interleave({statement: process(statement) for statement in STATEMENTS}, rounds=args.rounds, warmup=2)
    middle = medians(times)
    for statement, seconds in middle.items():
        print(f"{statement:20} {seconds:.3f} s")
    print(f"jaxlm.losses / jax: {middle[STATEMENTS[1]] / middle[STATEMENTS[0]]:.3f}")
    return 0


def process(statement: str) -> Callable[[], None]:
    """A function that runs the statement in a new interpreter, and fails if it does."""

    def run() -> None:
        subprocess.run([sys.executable, "-c", statement], check=True)

    return run
