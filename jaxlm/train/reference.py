"""What a frozen model says of the data: one pass over the rows, kept in a file under a key of all it depends on."""

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
    folder: Path, key: Mapping[str, Any], compute: Callable[[], np.ndarray], *, size: int
) -> tuple[np.ndarray, bool]:
    """The values [size] of this key from `folder`, or computed and kept there; and whether they were found.

    key: JSON values, all that the values depend on; a change in any of them is another entry. Of several processes the
    first reads and writes, and tells the others: they need not share the folder, and all compute, or none.
    """
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"
    found = bool(_from_first(np.array(path.is_file())))
    if found:
        return _from_first(np.load(path) if jax.process_index() == 0 else np.zeros(size, np.float32)), True
    values = compute()
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp.npy")
        np.save(temporary, values)
        temporary.replace(path)
        path.with_suffix(".json").write_text(text + "\n")
    return values, False


def _from_first(x: np.ndarray) -> np.ndarray:
    """The first process's array, on all of them."""
    if jax.process_count() == 1:
        return x
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(x))


def make_score_step(scorer: Scorer, mesh: Mesh) -> Callable[[Params, Batch], Responses]:
    """(params, batch of tokens) -> the scores [B, slots], whole on every process; jitted."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda params, batch: scorer(params, batch, None), out_shardings=whole)


def map_rows(
    step: Callable[[Batch], Array], batches: Iterable[Any], *, place: Callable[[Any], Batch], total: int, what: str
) -> np.ndarray:
    """What a frozen model says of every row, [rows, ...], batch by batch with progress.

    step: a batch on devices -> [B, ...], whole on every process. batches: the host batches of all rows in order; total:
    how many. what: is computed, for the bar.
    """
    progress = tqdm(batches, total=total, desc=what, unit="batch", disable=None)
    return np.concatenate([np.asarray(step(place(batch))) for batch in progress])
