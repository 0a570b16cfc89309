"""Contrastive losses of sentence vectors: each row against its positive, all other rows of the batch as negatives.

Under jit with sharded arrays the batch is the global one: the negatives are those of every device, with gradients
through all of them, and no code here knows of devices. Losses on scored pairs: `similarity`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxlm.losses.scores import Scalar, check_number, wide
from jaxlm.typing import Array, Bool, Float, Int


def unit(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """The vectors at length 1.

        x / |x|

    x: [..., E]. Result: float32 or wider. Numerics: a zero vector stays zero, with a zero gradient.

    >>> import jax.numpy as jnp
    >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(1).tolist()
    [[0.6..., 0.8...], [0.0, 0.0]]
    """
    x = wide(x)
    # Scaled by the largest entry first, so that squares neither overflow nor vanish.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.where(squared > 0, x * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)


def cosine(a: Float[Array, "... E"], b: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Cosine of the angle between vectors, pair by pair.

        cos(a, b) = a . b / (|a| |b|)

    a, b: [..., E]. Result: [...] in [-1, 1]; 0 where either is zero.

    >>> import jax.numpy as jnp
    >>> print(f"{cosine(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])):.4f}")
    0.7071
    """
    return jnp.sum(unit(a) * unit(b), axis=-1)


def cosines(a: Float[Array, "B E"], b: Float[Array, "N E"]) -> Float[Array, "B N"]:
    """Cosine of every row of a with every row of b.

    >>> import jax.numpy as jnp
    >>> cosines(jnp.eye(2), jnp.array([[0.0, 2.0]])).tolist()
    [[0.0], [1.0]]
    """
    return jnp.matmul(unit(a), unit(b).T, precision="highest")


def info_nce(
    query: Float[Array, "B E"],
    key: Float[Array, "N E"],
    *,
    temperature: Scalar,
    positive: Int[Array, "B"] | None = None,
    negative_mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B"]:
    """The positive's cross-entropy among the keys, by cosine.

        loss_i = -log softmax_j( cos(q_i, k_j) / temperature )[positive_i]

    query: [B, E], key: [N, E], any lengths. temperature: positive; 0.05 is SimCSE's. positive: [B] the row of `key`
    that belongs to each query; by default row i, so that hard negatives follow as further rows. negative_mask: [B, N],
    False drops a false negative from the sum (`distinct`, `guided_negatives`); the positive always counts.

    Result: [B] nats, at least 0; log N where all keys are alike; 0 where no negative is left. Numerics: float32 or
    wider, products at full precision; a dropped key gets a zero gradient from that query.

    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4. One direction: `symmetric_info_nce` has both.

    >>> import jax.numpy as jnp
    >>> print(f"{info_nce(jnp.eye(2), jnp.eye(2), temperature=1.0)[0]:.4f}")
    0.3133
    """
    _check_vectors(query=query, key=key)
    return _cross_entropy(cosines(query, key), temperature, positive, negative_mask)


def symmetric_info_nce(
    first: Float[Array, "B E"],
    second: Float[Array, "B E"],
    *,
    temperature: Scalar,
    negative_mask: Bool[Array, "B B"] | None = None,
) -> Float[Array, "B"]:
    """`info_nce` in both directions, averaged: row i of one side among the rows of the other.

        loss_i = ( -log softmax_j(s_ij)[i] - log softmax_j(s_ji)[i] ) / 2        s_ij = cos(a_i, b_j) / temperature

    first, second: [B, E]. negative_mask: [B, B], entry [i, j] for the pair (first i, second j). Result: [B] nats.

    Source: Radford et al. 2021, arXiv:2103.00020, figure 3.

    >>> import jax.numpy as jnp
    >>> print(f"{symmetric_info_nce(jnp.eye(2), jnp.eye(2), temperature=1.0)[0]:.4f}")
    0.3133
    """
    if first.shape != second.shape:
        raise ValueError(f"expected two sides of one shape, found {first.shape} and {second.shape}")
    s = cosines(first, second)
    back = None if negative_mask is None else negative_mask.T
    return (_cross_entropy(s, temperature, None, negative_mask) + _cross_entropy(s.T, temperature, None, back)) / 2


def simcse(
    query: Float[Array, "B E"],
    positive: Float[Array, "B E"],
    hard_negative: Float[Array, "B E"] | Float[Array, "B K E"] | None = None,
    *,
    temperature: Scalar = 0.05,
    hard_negative_weight: Scalar = 1.0,
    negative_mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B"]:
    """SimCSE: the positive among all positives of the batch and all hard negatives of the batch.

        loss_i = -log e^{s(q_i, p_i)} / sum_j ( e^{s(q_i, p_j)} + sum_k alpha^{[i = j]} e^{s(q_i, n_jk)} )
        s(a, b) = cos(a, b) / temperature

    query, positive: [B, E]; unsupervised, one sentence under two dropout keys. hard_negative: [B, E], or [B, K, E] for
    several. hard_negative_weight: alpha, what a query's own hard negatives count (the released code's flag is its log).
    negative_mask: [B, B + B K], False drops a candidate: the positives first, then n_11 … n_1K, n_21 ….

    Result: [B] nats, at least 0. Source: Gao et al. 2021, arXiv:2104.08821, equations 1 and 5, and section 4 for alpha.

    >>> import jax.numpy as jnp
    >>> print(f"{simcse(jnp.eye(2), jnp.eye(2), jnp.ones((2, 2)), temperature=1.0)[0]:.4f}")
    1.0509
    """
    if query.shape != positive.shape:
        raise ValueError(f"expected a positive for every query, found shapes {query.shape} and {positive.shape}")
    if hard_negative is None:
        return info_nce(query, positive, temperature=temperature, negative_mask=negative_mask)
    check_number("hard_negative_weight", hard_negative_weight, "positive", lambda w: w > 0, "1 counts them as others")
    rows, width = query.shape
    own = hard_negative.reshape(rows, -1, width)
    per_row = own.shape[1]
    s = cosines(query, jnp.concatenate([positive, own.reshape(-1, width)]))
    is_own = jnp.eye(rows, dtype=bool).repeat(per_row, axis=1)
    is_own = jnp.concatenate([jnp.zeros((rows, rows), bool), is_own], axis=1)
    bias = jnp.where(is_own, jnp.log(jnp.asarray(hard_negative_weight, s.dtype)), 0)
    return _cross_entropy(s, temperature, None, negative_mask, bias)


def distinct(query: Int[Array, "B"], key: Int[Array, "N"]) -> Bool[Array, "B N"]:
    """A negative_mask by identity: False where query and key have one id (a duplicate, a concept, a document).

    >>> import jax.numpy as jnp
    >>> distinct(jnp.array([7, 8]), jnp.array([7, 8, 7])).tolist()
    [[False, True, False], [True, False, True]]
    """
    return query[:, None] != key[None, :]


def guided_negatives(similarity: Float[Array, "B N"], positive: Float[Array, "B"], *, margin: float = 0.0,
           relative: bool = False) -> Bool[Array, "B N"]:  # fmt: skip
    """A negative_mask by a guide model: False where the guide finds a candidate closer than the positive.

        keep  if  similarity_ij <= positive_i - margin        relative: positive_i - margin |positive_i|

    similarity: [B, N] the guide's cosines (`cosines`). positive: [B] its cosine of each query with its positive.
    margin: at least 0. Source: Solatorio 2024 (GISTEmbed), arXiv:2402.16829.

    >>> import jax.numpy as jnp
    >>> guided_negatives(jnp.array([[0.8, 0.9, 0.7]]), jnp.array([0.8])).tolist()
    [[True, False, True]]
    """
    check_number("margin", margin, "at least 0", lambda m: m >= 0, "0 drops what is closer than the positive")
    limit = positive - margin * jnp.abs(positive) if relative else positive - margin
    return similarity <= limit[:, None]


def alignment(first: Float[Array, "B E"], second: Float[Array, "B E"]) -> Float[Array, "B"]:
    """How far the vectors of a positive pair are apart on the sphere; lower is better.

        |x / |x| - y / |y||^2 = 2 - 2 cos(x, y)

    first, second: [B, E]. Result: [B] in [0, 4]; the metric is its mean. Source: Wang and Isola 2020, arXiv:2005.10242.

    >>> import jax.numpy as jnp
    >>> alignment(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])).tolist()
    [2.0]
    """
    return jnp.sum((unit(first) - unit(second)) ** 2, axis=-1)


def uniformity(x: Float[Array, "B E"], *, t: float = 2.0) -> Float[Array, ""]:
    """How evenly the vectors cover the sphere; lower is better.

        log mean_{i < j} exp( -t |x_i / |x_i| - x_j / |x_j||^2 )

    x: [B, E], B at least 2. Result: at most 0, which is full collapse. Source: Wang and Isola 2020, arXiv:2005.10242.

    >>> import jax.numpy as jnp
    >>> float(uniformity(jnp.eye(3)))
    -4.0
    """
    rows = x.shape[0]
    if rows < 2:
        raise ValueError(f"uniformity compares vectors with one another: expected at least 2, found {rows}")
    exponent = -t * (2 - 2 * cosines(x, x))
    pairs = jnp.triu(jnp.ones((rows, rows), bool), k=1)
    return jax.nn.logsumexp(exponent, where=pairs) - math.log(rows * (rows - 1) / 2)


def _cross_entropy(
    s: Float[Array, "B N"],
    temperature: Scalar,
    positive: Int[Array, "B"] | None,
    negative_mask: Bool[Array, "B N"] | None,
    bias: Float[Array, "B N"] | float = 0.0,
) -> Float[Array, "B"]:
    check_number("temperature", temperature, "positive", lambda t: t > 0, "0.05 is SimCSE's")
    rows, keys = s.shape
    if positive is None:
        if keys < rows:
            raise ValueError(f"expected a key for each of the {rows} queries, found {keys}; or name them by `positive`")
        positive = jnp.arange(rows)
    is_positive = jnp.arange(keys)[None, :] == positive[:, None]
    kept = None
    if negative_mask is not None:
        if negative_mask.shape != s.shape:
            raise ValueError(
                f"expected a negative_mask of queries by candidates {s.shape}, found {negative_mask.shape}"
            )
        kept = negative_mask | is_positive
    logits = s / temperature + bias
    right = jnp.take_along_axis(logits, positive[:, None], axis=1)
    # Less the positive before the sum and not after it: rounding can then never make a loss negative.
    return jax.nn.logsumexp(logits - right, axis=1, where=kept)


def _check_vectors(**arrays: Array) -> None:
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[-1] for shape in shapes.values()}) > 1:
        raise ValueError(f"expected vectors [rows, E] of one width, found {shapes}")
