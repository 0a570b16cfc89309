"""Losses of a model that predicts the vector of the next sentence: one value per sentence, the caller reduces.

Vectors are [B, M, Z]: M places of sentences in each of B samples, of which `mask` keeps those that there are. A place
that is masked gives exactly 0 and a zero gradient, whatever stands there.

Source: Hwang et al. 2025, arXiv:2505.22202, section 3.2. Under jit with sharded arrays the negatives are those of the
global batch; the released code takes those of one device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.losses.contrastive import cosine, info_nce
from jaxlm.losses.lm import cross_entropy
from jaxlm.losses.scores import Scalar, wide
from jaxlm.ops.masked import masked_sum
from jaxlm.typing import Array, Bool, Float, Int


def next_sentence_nll(
    hidden: Float[Array, "*sentences S D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "*sentences S"],
    *,
    mask: Bool[Array, "*sentences S"],
    bias: Float[Array, "V"] | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "*sentences"]:
    """Negative log-likelihood of each sentence under a decoder that reads one vector and then the sentence.

        nll = -sum_t mask_t log p(y_t | y_<t, vector)

    hidden: [..., S, D], the decoder's state t is that after the vector and y_<t: the vector is the shift by one.
    unembed: [V, D]. targets: [..., S] the sentence, its end token with it. mask: [..., S], True keeps. bias, soft_cap,
    implementation: as in `cross_entropy`. Result: [...] nats, at least 0; 0 for a sentence that is masked whole.

    Source: arXiv:2505.22202, equation of L_CE in section 3.1. Gradients pass through a frozen decoder: stop them at its
    parameters, not here.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, True], [False, False]])
    >>> nll = next_sentence_nll(jnp.ones((2, 2, 3)), jnp.zeros((4, 3)), jnp.zeros((2, 2), int), mask=mask)
    >>> print(jnp.exp(nll).round())  # 1 in 4, twice
    [16.  1.]
    """
    nll = cross_entropy(
        hidden, unembed, targets, mask=mask, bias=bias, soft_cap=soft_cap, implementation=implementation
    )
    return masked_sum(nll, mask, axis=-1)


def latent_info_nce(
    output: Float[Array, "B M Z"],
    target: Float[Array, "B M Z"],
    *,
    mask: Bool[Array, "B M"],
    temperature: Scalar = 0.1,
) -> Float[Array, "B M"]:
    """InfoNCE of predicted vectors: each against its target, those of all other sentences of the batch as negatives.

        loss_bm = -log softmax_{b'm'}( cos(o_bm, k_b'm') / temperature )[bm]        over places that the mask keeps

    output: [B, M, Z] what the latent model says at each place. target: [B, M, Z] the mapped vector of the sentence that
    follows. mask: [B, M]. temperature: positive. Result: [B, M] nats, at least 0. Only directions enter: the scale of
    neither side is tied (`latent_squared_error`). The other direction is this function with its arguments swapped; the
    released code of the contextual encoder's term has that one, where the paper writes this.

    >>> import jax.numpy as jnp
    >>> vectors, mask = jnp.eye(3)[None], jnp.array([[True, True, False]])
    >>> print(jnp.exp(-latent_info_nce(vectors, vectors, mask=mask, temperature=1.0)))  # e / (e + 1), twice
    [[0.7310586 0.7310586 1.       ]]
    """
    _check(output=output, target=target, mask=mask)
    flat = mask.reshape(-1)
    query, key = (jnp.where(flat[:, None], x.reshape(-1, x.shape[-1]), 0) for x in (output, target))
    negatives = jnp.broadcast_to(flat[None, :], (flat.shape[0], flat.shape[0]))
    loss = info_nce(query, key, temperature=temperature, negative_mask=negatives)
    return jnp.where(mask, loss.reshape(mask.shape), 0)


def latent_cosine(
    output: Float[Array, "B M Z"], target: Float[Array, "B M Z"], *, mask: Bool[Array, "B M"]
) -> Float[Array, "B M"]:
    """How far predicted vectors point from their targets.

        loss = 1 - cos(o, k)

    output, target: [B, M, Z]. mask: [B, M]. Result: [B, M] in [0, 2]. For comparison: without negatives, one
    vector for all sentences is its best where several could follow.

    >>> import jax.numpy as jnp
    >>> latent_cosine(jnp.ones((1, 1, 2)), -jnp.ones((1, 1, 2)), mask=jnp.ones((1, 1), bool)).round(4).tolist()
    [[2.0]]
    """
    _check(output=output, target=target, mask=mask)
    output, target = (jnp.where(mask[..., None], x, 0) for x in (output, target))
    return jnp.where(mask, 1 - cosine(output, target), 0)


def latent_squared_error(
    output: Float[Array, "B M Z"], target: Float[Array, "B M Z"], *, mask: Bool[Array, "B M"]
) -> Float[Array, "B M"]:
    """Squared error of predicted vectors, averaged over their entries.

        loss = sum_z (o_z - k_z)^2 / Z

    output, target: [B, M, Z]. mask: [B, M]. Result: [B, M], at least 0. With `jax.lax.stop_gradient` on the target it
    ties the scale of the outputs to that of the inputs, which continuous inference needs since it feeds one back as the
    other; ours, not the paper's, whose cosine leaves the scale free.

    >>> import jax.numpy as jnp
    >>> latent_squared_error(jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2)), mask=jnp.ones((1, 1), bool)).tolist()
    [[1.0]]
    """
    _check(output=output, target=target, mask=mask)
    difference = jnp.where(mask[..., None], wide(output) - wide(target), 0)
    return jnp.mean(jnp.square(difference), axis=-1)


def termination(
    logit: Float[Array, "B M"], stop: Bool[Array, "B M"], *, mask: Bool[Array, "B M"]
) -> Float[Array, "B M"]:
    """Binary cross-entropy of a classifier that says after which sentence the reasoning ends.

        loss = log(1 + e^x) - stop x        p(stop) = 1 / (1 + e^-x)

    logit: [B, M]. stop: [B, M], True at the last sentence. mask: [B, M]. Result: [B, M] nats, at least 0.

    Source: arXiv:2505.22202, appendix D.

    >>> import jax.numpy as jnp
    >>> print(termination(jnp.zeros((1, 1)), jnp.ones((1, 1), bool), mask=jnp.ones((1, 1), bool)).round(4))
    [[0.6931]]
    """
    if not logit.shape == stop.shape == mask.shape:
        raise ValueError(f"logit, stop and mask must have one shape, found {logit.shape}, {stop.shape}, {mask.shape}")
    x = jnp.where(mask, wide(logit), 0)
    return jnp.where(mask, jax.nn.softplus(jnp.where(stop, -x, x)), 0)


def _check(*, output: Array, target: Array, mask: Array) -> None:
    if output.ndim != 3 or output.shape != target.shape or mask.shape != output.shape[:2]:
        raise ValueError(
            f"expected output and target [B, M, Z] of one shape and mask [B, M]; found {output.shape}, {target.shape}, "
            f"{mask.shape}"
        )
