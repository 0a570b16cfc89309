"""token_stats compiled for a chip that is not here: that it compiles, and the memory and the cycles that it takes.

Cycles are the compiler's (`jaxlm.bench.cycles`), of TPUs only: to compare programs by, not a time that was measured.

Needs libtpu (pip install 'jaxlm[tpu]'), or for a GPU Python 3.12 and its compiler (pip install 'jaxlm[cuda]').
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxlm.bench import cycles
from jaxlm.ops.platform import compiling_for
from jaxlm.ops.token_stats import token_stats
from jaxlm.sharding.topology import devices_of

KERNELS = {"tpu": "pallas_tpu", "cuda": "mosaic_gpu", "gpu": "mosaic_gpu"}
CALLS = ("tpu_custom_call", "mosaic_gpu")


class Compiled(NamedTuple):
    """A program: temp_bytes beside arguments and results; kernel: it calls one; logits: it has an array of
    [tokens, vocabulary]; cycles: of one core, all tokens counting, None where the compiler gives none."""

    implementation: str
    masked: bool
    direction: str
    temp_bytes: int
    kernel: bool
    logits: bool
    cycles: int | None


def compile_for(topology: str, *, num_tokens: int, width: int, vocab: int) -> Iterator[Compiled]:
    """Every implementation and direction for one chip of the topology, with and without a mask, in bfloat16."""
    device = devices_of(topology)[0]
    if device.platform not in KERNELS:
        raise ValueError(f"--compile-for {topology}: expected a TPU or a GPU, as v5e:2x2 or h200:1x1")
    size = dict(num_tokens=num_tokens, width=width, vocab=vocab)
    # The blocks of tokens are shared out over the cores of a chip.
    of_kernel = cycles.of_kernel(topology, **size) if device.platform == "tpu" else None
    shared = None if of_kernel is None else of_kernel // getattr(device, "num_cores", 1)
    for implementation in ("tiled", KERNELS[device.platform]):
        for masked in (False, True):
            for direction in ("forward", "gradients"):
                program = _program(implementation, direction, masked=masked)
                compiled = _compile(program, device, **size)
                text = compiled.as_text()
                logits = any(f"[{a},{b}]" in text for a, b in ((num_tokens, vocab), (vocab, num_tokens)))
                kernel = any(call in text for call in CALLS)
                temp_bytes = compiled.memory_analysis().temp_size_in_bytes
                count = cycles.of_program(text) if device.platform == "tpu" else None
                if kernel and count is not None:
                    count = None if shared is None else count + shared
                yield Compiled(implementation, masked, direction, temp_bytes, kernel, logits, count)


def _program(implementation: str, direction: str, *, masked: bool) -> Callable[..., Any]:
    def forward(hidden: Any, unembed: Any, targets: Any, mask: Any) -> Any:
        stats = token_stats(hidden, unembed, targets, mask=mask if masked else None, implementation=implementation)
        return stats.logprob, stats.entropy

    def gradients(hidden: Any, unembed: Any, targets: Any, mask: Any) -> Any:
        def total(hidden: Any, unembed: Any) -> Any:
            return sum(jnp.sum(x) for x in forward(hidden, unembed, targets, mask))

        return jax.grad(total, (0, 1))(hidden, unembed)

    return forward if direction == "forward" else gradients


def _compile(program: Callable[..., Any], device: Any, num_tokens: int, width: int, vocab: int) -> Any:
    shapes = [((num_tokens, width), jnp.bfloat16), ((vocab, width), jnp.bfloat16), ((num_tokens,), jnp.int32)]
    place = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(*x, sharding=place) for x in (*shapes, ((num_tokens,), jnp.bool_))]
    with compiling_for("gpu" if device.platform == "cuda" else device.platform, [device]):
        return jax.jit(program).lower(*arguments).compile()


def table(lines: list[Compiled]) -> str:
    """The programs as a person reads them."""
    head = f"{'':12}{'':10}{'':8}{'temp MiB':>10}{'Mcycles':>10}  logits held"
    rows = [
        f"{x.implementation:12}{x.direction:10}{'masked' if x.masked else '':8}{x.temp_bytes / 2**20:10.1f}"
        f"{'' if x.cycles is None else format(x.cycles / 1e6, '.1f'):>10}  {'yes' if x.logits else 'no'}"
        for x in lines
    ]
    return "\n".join([head, *rows])
