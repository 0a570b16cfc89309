"""Losses on pairs of sentence vectors with a gold score, and the wrapper that trains their prefixes too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxlm.losses.contrastive import cosine
from jaxlm.losses.scores import Scalar, check_one_shape, wide
from jaxlm.typing import Array, Float


def cosine_mse(first: Float[Array, "B E"], second: Float[Array, "B E"], score: Float[Array, "B"]) -> Float[Array, "B"]:
    """Squared error of the cosine as a prediction of the score.

        loss = ( cos(x, y) - score )^2

    first, second: [B, E]. score: [B] in [-1, 1] (STS scores 0 to 5: divide by 5). Result: [B].

    Source: Reimers and Gurevych 2019 (Sentence-BERT), arXiv:1908.10084, the regression objective.

    >>> import jax.numpy as jnp
    >>> cosine_mse(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([0.5])).tolist()
    [0.25]
    """
    found = cosine(first, second)
    check_one_shape(cosine=found, score=score)
    return (found - wide(score)) ** 2


def cosent(
    first: Float[Array, "B E"], second: Float[Array, "B E"], score: Float[Array, "B"], *, scale: Scalar = 20.0
) -> Float[Array, ""]:
    """CoSENT: every two pairs whose cosines are not in the order of their scores are penalised, the batch as one sum.

        loss = log( 1 + sum over (i, j) with score_i < score_j of exp( scale (cos_i - cos_j) ) )

    first, second: [B, E]. score: [B], any scale; only its order counts, and equal scores are not compared. scale: the
    inverse temperature. Result: one number, nats, at least 0 (it does not split into rows); 0 if all scores are equal.

    Source: Su 2022, https://kexue.fm/archives/8847.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{cosent(x, x, jnp.array([0.0, 1.0])):.4f}")
    0.6931
    """
    return _ranking(cosine(first, second), score, scale)


def angle(
    first: Float[Array, "B E"], second: Float[Array, "B E"], score: Float[Array, "B"], *, scale: Scalar = 20.0
) -> Float[Array, ""]:
    """AnglE: `cosent` on `angle_similarity`, whose gradient does not vanish where the cosine saturates.

    Arguments and result as in `cosent`; E even. Source: Li and Li 2023, arXiv:2309.12871, equation 7.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{angle(x, x, jnp.array([0.0, 1.0])):.4f}")
    0.6931
    """
    return _ranking(angle_similarity(first, second), score, scale)


def angle_similarity(first: Float[Array, "B E"], second: Float[Array, "B E"]) -> Float[Array, "B"]:
    """AnglE's similarity: the halves of a vector are real and imaginary parts, divided as complex numbers.

        | sum_k Re(z_k) + Im(z_k) |        z_k = x_k conj(y_k) / (|x| |y|)

    first, second: [B, E], E even. Result: [B], at least 0 and at most sqrt(2); 0 where either is zero.

    Source: Li and Li 2023, arXiv:2309.12871, equations 4 to 6, with the sum and absolute value of the released code.

    >>> import jax.numpy as jnp
    >>> angle_similarity(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 1.0]])).round(4).tolist()
    [1.0]
    """
    width = first.shape[-1]
    if width % 2 or first.shape != second.shape:
        raise ValueError(f"expected two sides of one even width, found {first.shape} and {second.shape}")
    # Re + Im of x conj(y), summed, is the product of (re + im, im - re) of x with (re, im) of y: a turn by 45 degrees.
    real, imaginary = jnp.split(wide(first), 2, axis=-1)
    turned = jnp.concatenate([real + imaginary, imaginary - real], axis=-1)
    return jnp.abs(jnp.sqrt(2.0) * cosine(turned, second))


def _ranking(similarity: Float[Array, "B"], score: Float[Array, "B"], scale: Scalar) -> Float[Array, ""]:
    check_one_shape(similarity=similarity, score=score)
    s = similarity * scale
    wrong = jnp.where(score[:, None] < score[None, :], s[:, None] - s[None, :], -jnp.inf)
    return jax.nn.logsumexp(jnp.concatenate([jnp.zeros(1, s.dtype), wrong.ravel()]))


def matryoshka(
    loss: Callable[..., Float[Array, "..."]], *, dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., Float[Array, "..."]]:
    """The loss on the first dims of the vectors, weighted and summed: prefixes become embeddings of their own.

        sum_m w_m loss(x[:m], y[:m], …)

    loss: any of vectors. dims: prefix lengths, the full width among them if it is to be trained. weights: one each
    (None: 1). Result: a function of positional arrays [..., E], which are cut, and of keywords, which pass unchanged.

    Source: Kusupati et al. 2022, arXiv:2205.13147, equation 1.

    >>> import jax.numpy as jnp
    >>> from jaxlm.losses import info_nce
    >>> loss = matryoshka(info_nce, dims=(2, 4), weights=(0.5, 1.0))
    >>> print(f"{loss(jnp.eye(4), jnp.eye(4), temperature=1.0)[0]:.4f}")
    1.1155
    """
    factors = [1.0] * len(dims) if weights is None else list(weights)
    if not dims or len(factors) != len(dims) or min(dims) < 1:
        raise ValueError(f"expected positive dims and a weight for each, found dims={dims} and weights={weights}")

    def total(*vectors: Array, **options: object) -> Float[Array, "..."]:
        widths = {x.shape[-1] for x in vectors}
        if len(widths) > 1 or max(dims) > min(widths):
            raise ValueError(
                f"expected vectors of one width, at least {max(dims)} (dims), found widths {sorted(widths)}"
            )
        parts = [w * loss(*(x[..., :m] for x in vectors), **options) for m, w in zip(dims, factors)]
        return jnp.sum(jnp.stack(parts), axis=0)

    return total
