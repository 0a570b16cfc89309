"""Where an encoder of sentences meets a loss: columns of texts to vectors, vectors to a sum and its weight."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.losses.contrastive import alignment, cosines, uniformity
from jaxlm.train.gradient_cache import EncodeFn, in_chunks
from jaxlm.typing import Array, Batch, Float, Key, LossFn, Metrics, Params

Objective = Callable[[Sequence[Float[Array, "B E"]], Batch], tuple[Float[Array, "..."], Metrics]]
"""(vectors of each column, batch) -> (losses [B] or one number for the whole batch, metrics)."""

_MORE = 1 << 20  # beyond any column's place, which the keys are folded with


def encode_columns(
    encode: EncodeFn,
    params: Params,
    batch: Batch,
    key: Key[Array, "B"] | None,
    columns: Sequence[str],
    *,
    chunk_size: int | None = None,
    one_mask: bool = False,
) -> list[Float[Array, "B E"]]:
    """The vectors of columns of a batch (`jaxlm.data.sentences`), in the order of their names.

    A name that stands twice is encoded twice, under dropout masks of its own: SimCSE's positive. one_mask: every column
    has the mask of the first instead (the ablation). chunk_size: sentences encoded at a time, see `in_chunks`. Columns
    of one length are encoded together.
    """
    alike: dict[int, list[int]] = collections.defaultdict(list)
    for place, name in enumerate(columns):
        alike[batch[f"{name}/tokens"].shape[1]].append(place)
    vectors: dict[int, Array] = {}
    for places in alike.values():
        # Side by side in a row and not one column after another, so that on a mesh every sentence stays where it is.
        sentences = {
            field: _flat(jnp.stack([batch[f"{columns[place]}/{field}"] for place in places], axis=1))
            for field in ("tokens", "segments")
        }
        keys = None if key is None else _flat(_keys(key, [0] * len(places) if one_mask else places))
        run = in_chunks(encode, num_chunks=_num_chunks(sentences["tokens"].shape[0], chunk_size))
        found = run(params, sentences, keys)
        found = found.reshape(-1, len(places), found.shape[-1])
        vectors |= {place: found[:, i] for i, place in enumerate(places)}
    return [vectors[place] for place in range(len(columns))]


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _keys(key: Key[Array, "B"], places: Sequence[int]) -> Key[Array, "B C"]:
    return jax.vmap(lambda k: jax.vmap(lambda place: jax.random.fold_in(k, place))(jnp.array(places)))(key)


def _num_chunks(rows: int, chunk_size: int | None) -> int:
    if chunk_size is None:
        return 1
    if rows % chunk_size:
        raise ValueError(f"chunk_size={chunk_size} does not divide the {rows} sentences that a step encodes at once")
    return rows // chunk_size


def make_contrastive_loss(
    encode: EncodeFn,
    columns: Sequence[str],
    objective: Objective,
    *,
    chunk_size: int | None = None,
    one_mask: bool = False,
    more: LossFn | None = None,
) -> LossFn:
    """A loss for the trainer: the objective on the vectors of the columns, weighted by the rows of the batch.

    The negatives are the whole batch on every device; a batch must therefore be one micro-batch. more: a further loss
    on the same batch, with keys of its own, whose mean is added (masked words, say).
    """

    def loss_fn(params: Params, batch: Batch, key: Key[Array, "B"] | None) -> tuple[Array, Array, Metrics]:
        vectors = encode_columns(encode, params, batch, key, columns, chunk_size=chunk_size, one_mask=one_mask)
        losses, metrics = objective(vectors, batch)
        rows = jnp.float32(vectors[0].shape[0])
        total = jnp.mean(losses)
        if more is not None:
            own = None if key is None else jax.vmap(jax.random.fold_in, (0, None))(key, _MORE)
            added, weight, others = more(params, batch, own)
            total, metrics = total + added / jnp.maximum(weight, 1), metrics | others
        return total * rows, rows, {"loss": (total * rows, rows)} | metrics

    return loss_fn


def pair_metrics(query: Float[Array, "B E"], positive: Float[Array, "B E"]) -> Metrics:
    """How a batch of pairs lies on the sphere: accuracy (of the nearest), alignment, uniformity (of the queries)."""
    rows = jnp.float32(query.shape[0])
    query, positive = jax.lax.stop_gradient((query, positive))
    right = jnp.argmax(cosines(query, positive), axis=1) == jnp.arange(query.shape[0])
    return {
        "accuracy": (jnp.sum(right.astype(jnp.float32)), rows),
        "alignment": (jnp.sum(alignment(query, positive)), rows),
        "uniformity": (uniformity(query) * rows, rows),
    }


def make_encode(forward: Callable[..., Any], pool: Callable[[Params, Array, Array], Array]) -> EncodeFn:
    """The encoder as `in_chunks` takes it. forward: (params, tokens, *, segments, key) -> hidden states; pool: (params,
    hidden, mask) -> vectors."""

    def encode(params: Params, batch: Batch, keys: Key[Array, "B"] | None) -> Float[Array, "B E"]:
        hidden = forward(params, batch["tokens"], segments=batch["segments"], key=keys)
        return pool(params, hidden, batch["segments"] != 0)

    return encode
