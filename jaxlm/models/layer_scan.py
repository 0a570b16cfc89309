"""Blocks one after the other: whole periods of the layer pattern under one scan, what fills no period unrolled.

One period at a time, so that windows and rotations, which differ between the kinds of a pattern, stay static.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.typing import Array

Layer = Callable[[Array, Any], tuple[Array, Any]]
"""(stream, one layer's inputs) -> (stream, the layer's outputs)."""

LayerOf = Callable[[str, bool], Layer]
"""(kind of layer, whether inside a scan) -> the function of such a layer."""


def run_layers(layer_of: LayerOf, x: Array, inputs: Any, *, pattern: Sequence[str], scan: bool) -> tuple[Array, Any]:
    """The stream after all layers, and their outputs stacked on axis 0.

    inputs: a tree whose leaves are stacked over the layers on axis 0. pattern: the kinds of layers, repeated over them.
    scan: False unrolls them all; the same numbers, longer compilation.
    """
    num_layers = len(jax.tree.leaves(inputs)[0])
    num_scanned = num_layers // len(pattern) * len(pattern) if scan else 0
    parts = []
    if num_scanned:
        x, outs = _scan(layer_of, x, jax.tree.map(lambda a: a[:num_scanned], inputs), pattern)
        parts.append(outs)
    if num_scanned < num_layers:
        rest = jax.tree.map(lambda a: a[num_scanned:], inputs)
        x, outs = _unrolled(x, rest, layer_of=layer_of, pattern=pattern, in_scan=False)
        parts.append(outs)
    return x, jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if len(parts) > 1 else parts[0]


def _scan(layer_of: LayerOf, x: Array, inputs: Any, pattern: Sequence[str]) -> tuple[Array, Any]:
    """Whole periods of the pattern, one after the other."""
    period = len(pattern)
    if period == 1:
        # Parameters reach the block as the scan hands them over: a slice of them would be kept for the backward pass,
        # layer by layer, as a second copy.
        return jax.lax.scan(layer_of(pattern[0], True), x, inputs)
    groups = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), inputs)
    x, outs = jax.lax.scan(partial(_unrolled, layer_of=layer_of, pattern=pattern, in_scan=True), x, groups)
    return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outs)


def _unrolled(x: Array, inputs: Any, *, layer_of: LayerOf, pattern: Sequence[str], in_scan: bool) -> tuple[Array, Any]:
    """Layers one after the other, the first at the start of the pattern; their outputs stacked."""
    flat, tree = jax.tree.flatten(inputs)
    outs = []
    for i, leaves in enumerate(zip(*map(jnp.unstack, flat))):
        x, out = layer_of(pattern[i % len(pattern)], in_scan)(x, jax.tree.unflatten(tree, leaves))
        outs.append(out)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)
