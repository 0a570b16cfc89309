"""Cycles of a program for a TPU that is not here, by its compiler.

What XLA makes has an estimate of the compiler's cost model beside each operation, which counts as often as the loops
around it run. What Mosaic makes of a Pallas kernel has none, but libtpu writes down its schedule, over which the grid
is a loop. Neither knows of waiting for the other units: both are for comparing programs, and no time.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxlm.ops.platform import compiling_for
from jaxlm.ops.token_stats import pallas_tpu
from jaxlm.ops.token_stats.head import Head
from jaxlm.sharding.topology import ENVIRONMENT, devices_of
from jaxlm.train.collectives import computations, run_counts
from jaxlm.typing import Array

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1
_ADDRESS = re.compile(r"^\s*(0x[0-9a-f]+|0) ([A-Z]{2})?", re.MULTILINE)


def of_program(hlo: str) -> int | None:
    """Of the operations that XLA made, by its optimized HLO; None if there is one that it has no estimate of."""
    if f'"estimated_cycles":"{_UNKNOWN}"' in hlo:
        return None
    bodies = computations(hlo)
    times = run_counts(bodies)
    return sum(
        times[name] * int(cycles) for name, lines in bodies.items() for cycles in _ESTIMATE.findall("\n".join(lines))
    )


def of_kernel(topology: str, *, num_tokens: int, width: int, vocab: int) -> int | None:
    """Of the forward kernel of `token_stats` for one chip of a TPU topology, in bfloat16; None if libtpu says nothing.

    Compiled in a process of its own: libtpu is told what to write down as it is loaded, and writing takes its time.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "jaxlm.bench.cycles", topology, *map(str, (num_tokens, width, vocab))]
        environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": told.strip()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        blocks = pallas_tpu.default_blocks(num_tokens, width, vocab, itemsize=2)
        length = scheduled(Path(folder), "token_stats_forward", ragged=bool(vocab % blocks.vocab))
    return None if length is None else length * blocks.steps(num_tokens, vocab)


def scheduled(folder: Path, name: str, *, ragged: bool) -> int | None:
    """Of one step of a kernel's grid, from what libtpu wrote into the folder; None if it wrote nothing of that name.

    ragged: the last of its blocks has a body of its own, as long as that of the others, which hardly ever runs.
    """
    found = [p for p in folder.glob(f"*-{name}*-final_bundles.txt") if "schedule-analysis" not in p.name]
    if not found:
        return None
    bundles = [(int(at, 16), mark) for at, mark in _ADDRESS.findall(max(found).read_text())]
    joins = [at for at, mark in bundles if mark == "PF"]  # where the two ways of a branch meet again
    bodies = sorted(b - a for a, b in itertools.pairwise(joins))
    rarely = bodies[-2] if ragged and len(bodies) > 1 else 0
    return bundles[-1][0] + 1 - rarely


def _compile_kernel(topology: str, num_tokens: int, width: int, vocab: int) -> None:
    place = SingleDeviceSharding(devices_of(topology)[0])
    shapes = ((num_tokens, width), jnp.bfloat16), ((vocab, width), jnp.bfloat16), ((num_tokens,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]

    def kernel(hidden: Array, unembed: Array, targets: Array) -> tuple:
        head = Head(hidden, unembed, None, None)
        return tuple(pallas_tpu.sums(head, targets, None, soft_cap=None, entropy=True)[:4])

    with compiling_for("tpu"):
        jax.jit(kernel).lower(*arguments).compile()


if __name__ == "__main__":
    _compile_kernel(sys.argv[1], *map(int, sys.argv[2:]))
