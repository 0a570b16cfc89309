"""The legend of shape letters, array aliases, and the protocols that packages meet through.

Letters in shapes: B batch, T query position, S key position, D width, N query heads, K key/value heads, H head dim,
F feed-forward, V vocabulary, L layers, C chunk, M sentences, Z latent width, E embedding width. `...` is any prefix.
Log-probabilities, entropies and losses are in nats unless a name says otherwise (`_bits`, `_bpb`, `_ppl`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Apply", "Array", "Batch", "Bool", "Constrain", "Float", "Int", "Key", "LossFn", "Metrics", "Params"]

Params = Any
"""A nested dict of arrays."""

Batch = Mapping[str, Array]
"""The arrays of one step; `jaxlm.data.batch` names them."""

Metrics = dict[str, tuple[Array, Array | None]]
"""Name -> (total, weight), both scalars: summed over micro-batches and devices, divided once, when reported. A weight
of None marks a count, whose mean is over steps."""


@runtime_checkable
class Constrain(Protocol):
    """Pins an activation to the mesh by the logical names of its axes; the identity on one device."""

    def __call__(self, x: Array, axes: tuple[str | None, ...]) -> Array: ...


@runtime_checkable
class Apply(Protocol):
    """Any model, as the trainer sees it: parameters and tokens in, hidden states (or logits) out."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None,
        segments: Int[Array, "B T"] | None,
        key: Key[Array, "B"] | None,
    ) -> Float[Array, "B T D"]: ...


@runtime_checkable
class LossFn(Protocol):
    """A loss over a batch as a sum and its weight, never a mean, so that any split of the batch adds up exactly.

    `key` holds one random key per row of the batch (None: deterministic), so that dropout does not depend on how the
    batch is split into micro-batches or over devices.
    """

    def __call__(self, params: Params, batch: Batch, key: Key[Array, "B"] | None) -> tuple[Array, Array, Metrics]: ...
