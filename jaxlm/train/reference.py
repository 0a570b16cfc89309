"""Reference log-probabilities computed once: a pass over the data, kept under a key of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxlm.train.preference import Responses, Scorer
from jaxlm.typing import Array, Batch, Params


def fingerprint(params: Params) -> str:
    """A checksum of every parameter: two trees with the same one hold the same bits under the same names.

    Per leaf, two sums over its words w_i of hash(w_i, i), modulo 2^32. They are exact in integers, so the same on any
    mesh, and are taken where the parameters lie: none is gathered.
    """
    sums = jax.jit(lambda tree: jax.tree.map(_checksum, tree))(params)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(sums))
    shapes = [f"{x.shape}{x.dtype}" for x in jax.tree.leaves(params)]
    text = [f"{jax.tree_util.keystr(path)}{shape}{value}" for (path, value), shape in zip(leaves, shapes)]
    return hashlib.sha256("".join(text).encode()).hexdigest()[:16]


def _checksum(x: Array) -> Array:
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    words = words.astype(jnp.uint32)
    # A position's number, built axis by axis, needs no flat copy of a sharded array.
    at = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        at = at * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.stack([jnp.sum(_mix(words ^ _mix(at + jnp.uint32(salt))), dtype=jnp.uint32) for salt in (1, 2)])


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words that spreads every bit (the finaliser of MurmurHash3, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def cached(
    folder: Path, key: Mapping[str, Any], compute: Callable[[], np.ndarray], *, write: bool = True
) -> tuple[np.ndarray, bool]:
    """The array of this key from `folder`, or computed and kept there; and whether it was found.

    key: JSON values, all that the array depends on; a change in any of them is another entry. write: whether this
    process keeps it (one of several does).
    """
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"
    if path.is_file():
        return np.load(path), True
    values = compute()
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp.npy")
        np.save(temporary, values)
        temporary.replace(path)
        path.with_suffix(".json").write_text(text + "\n")
    return values, False


def make_score_step(scorer: Scorer, mesh: Mesh) -> Callable[[Params, Batch], Responses]:
    """(params, batch of tokens) -> the scores [B, slots], whole on every process; jitted."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda params, batch: scorer(params, batch, None), out_shardings=whole)


def reference_logprobs(
    step: Callable[[Batch], Array], batches: Iterable[Any], *, place: Callable[[Any], Batch], total: int, name: str
) -> np.ndarray:
    """The summed log-probabilities of every row, [rows, slots], batch by batch with progress.

    step: a batch on devices -> [B, slots]; batches: the host batches of all rows in order; total: how many.
    """
    progress = tqdm(batches, total=total, desc=f"reference log-probabilities of {name}", unit="batch", disable=None)
    return np.concatenate([np.asarray(step(place(batch))) for batch in progress])
