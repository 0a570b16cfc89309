"""What a saved tree of arrays consists of: path, shape, dtype and a checksum of every leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.typing import Array, Int

Manifest = dict[str, dict[str, Any]]
MAX_LISTED = 20


def make_manifest(parts: Any) -> Manifest:
    """Path -> shape, dtype and checksum of every leaf of a tree of arrays, as JSON values."""
    leaves = _leaves(parts)
    checksums = jax.device_get(_checksums(leaves))
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "checksum": int(checksums[name])}
        for name, leaf in leaves.items()
    }


def check(manifest: Manifest, targets: Any, *, where: str) -> None:
    """Raises ValueError naming every leaf in which a saved tree is not the wanted one: path, shape or dtype.

    manifest: of the saved tree; targets: the wanted tree, of arrays or `jax.ShapeDtypeStruct`; where: for the message.
    """
    wanted = {name: _describe(leaf) for name, leaf in _leaves(targets).items()}
    saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in manifest.items()}
    problems = [f"{name}: expected {wanted[name]}, not in the checkpoint" for name in wanted if name not in saved]
    problems += [f"{name}: in the checkpoint as {saved[name]}, not expected" for name in saved if name not in wanted]
    problems += [
        f"{name}: expected {wanted[name]}, saved as {saved[name]}"
        for name in wanted
        if name in saved and wanted[name] != saved[name]
    ]
    if problems:
        more = f"\n  … and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ValueError(
            f"{where} is not of this model and optimizer (the config that saved it is in its record):\n  "
            + "\n  ".join(problems[:MAX_LISTED])
            + more
        )


def _leaves(parts: Any) -> dict[str, Any]:
    with_path = jax.tree_util.tree_flatten_with_path(parts)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in with_path}


def _describe(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


@jax.jit
def _checksums(leaves: dict[str, Array]) -> dict[str, Int[Array, ""]]:
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(x: Array) -> Int[Array, ""]:
    """sum_i bits_i (2 i + 1) mod 2^32: an integer sum, so no sharding or order of addition changes it."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (2 * position + 1), dtype=jnp.uint32)
