"""A batch encoded in chunks, for contrastive losses whose negatives are the whole batch.

Micro-batches would shrink the negatives; here the loss still sees every vector, and only the encoder's activations are
those of one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxlm.train.step import split_rows
from jaxlm.typing import Array, Batch, Float, Key, Params

EncodeFn = Callable[[Params, Batch, Key[Array, "B"] | None], Float[Array, "B E"]]
"""(params, batch, keys) -> the vectors of its rows; a row's vector must depend on that row and its key alone."""


def in_chunks(encode: EncodeFn, *, num_chunks: int) -> EncodeFn:
    """The same function with the memory of one chunk: each is computed again in the backward pass.

        d loss / d params = sum_c (d loss / d vectors_c) (d vectors_c / d params)

    num_chunks: divides the batch's rows; 1 leaves the function as it is. Result and gradient are those of the whole
    batch up to the order of sums, dropout included, since every row brings its key. Chunk c holds rows c, c + n, …, so
    that on a mesh every device keeps its own rows.

    Source: Gao et al. 2021 (GradCache), arXiv:2101.06983, section 3: reverse mode through a scan of rematerialised
    chunks is that algorithm.
    """
    if num_chunks < 1:
        raise ValueError(f"num_chunks: expected at least 1, found {num_chunks}")
    if num_chunks == 1:
        return encode

    def run(params: Params, batch: Batch, keys: Key[Array, "B"] | None) -> Float[Array, "B E"]:
        parts = jax.tree.map(lambda x: split_rows(x, num_chunks), (dict(batch), keys))
        # A scan's body cannot be merged with its own recomputation, so the barrier against that would only cost time.
        one = jax.checkpoint(lambda part: encode(params, *part), prevent_cse=False)
        vectors = jax.lax.map(one, parts)
        return vectors.swapaxes(0, 1).reshape(-1, *vectors.shape[2:])

    return run
