"""From the hidden states of a sentence to its vector: one function per pooler, alike for encoders and decoders.

The mask is data: True where a token counts. Padding is never counted, and a prompt (an instruction before the text) is
left out by making it False there.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxlm.models import layers
from jaxlm.ops.masked import masked_mean
from jaxlm.typing import Array, Bool, Float, Params


def mean(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean over the tokens that count.

        sum_t mask_t h_t / max(sum_t mask_t, 1)

    Result: [B, D] float32 or wider; a row in which nothing counts gives 0. NaN under the mask stays there.

    >>> import jax.numpy as jnp
    >>> mean(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
    [[2.0]]
    """
    return masked_mean(hidden, mask[..., None], axis=1)


def first(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """State of the first token that counts: [CLS] for BERT, wherever the padding is. 0 where nothing counts.

    >>> import jax.numpy as jnp
    >>> first(jnp.array([[[1.0], [3.0]]]), jnp.array([[False, True]])).tolist()
    [[3.0]]
    """
    return _at(hidden, mask, jnp.argmax(mask, axis=1))


def last(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """State of the last token that counts, which alone has seen them all in a causal model. 0 where nothing counts.

    >>> import jax.numpy as jnp
    >>> last(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
    [[3.0]]
    """
    return _at(hidden, mask, mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1))


def first_last_mean(states: Float[Array, "S B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """`mean` of the average of the first and the last block's states.

    states: [L + 1, B, T, D], the embeddings first, which are not the first block's. Source: SimCSE's "avg_first_last"
    (Gao et al. 2021, arXiv:2104.08821), whose first is index 1 too.

    >>> import jax.numpy as jnp
    >>> first_last_mean(jnp.array([7.0, 1.0, 5.0, 3.0]).reshape(4, 1, 1, 1), jnp.array([[True]])).tolist()
    [[2.0]]
    """
    return mean((states[1] + states[-1]) / 2, mask)


def top_two_mean(states: Float[Array, "S B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """`mean` of the average of the last two blocks' states: SimCSE's "avg_top2".

    >>> import jax.numpy as jnp
    >>> top_two_mean(jnp.array([7.0, 1.0, 5.0, 3.0]).reshape(4, 1, 1, 1), jnp.array([[True]])).tolist()
    [[4.0]]
    """
    return mean((states[-2] + states[-1]) / 2, mask)


def head(params: Params, pooled: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """BERT's dense layer and tanh over the first token's state; SimCSE trains with it and drops it at test time.

        tanh(W h + b)

    params: the encoder's `head`.
    """
    return jnp.tanh(layers.project(params, pooled[:, None])[:, 0])


def _at(hidden: Array, mask: Array, index: Array) -> Array:
    found = jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]
    return jnp.where(jnp.any(mask, axis=1)[:, None], found, 0)
