"""The head of a masked language model, on the hidden states of `jaxlm.models.encoder`.

transform(hidden) is what `jaxlm.losses.masked_lm` multiplies with `head`'s unembedding, the token embeddings again:

    logits = E norm(act(W h + c)) + b
"""

from __future__ import annotations

from jaxlm.models import layers
from jaxlm.models.block import linear_spec
from jaxlm.models.config import EncoderConfig, MaskedLMConfig
from jaxlm.models.encoder_block import layer_norm, norm_spec
from jaxlm.models.spec import Param, Spec, zeros
from jaxlm.typing import Array, Float, Params


def spec(cfg: EncoderConfig) -> Spec:
    """The parameters under `masked_lm` of an encoder with this head."""
    head = _config(cfg)
    bias = {"bias": Param((cfg.vocab_size,), ("vocab",), zeros, decay=False)} if head.vocab_bias else {}
    dense = linear_spec((cfg.width, cfg.width), ("embed", None), bias_dims=int(head.dense_bias))
    return {"dense": dense, "norm": norm_spec(cfg)} | bias


def transform(params: Params, hidden: Float[Array, "B T D"], *, cfg: EncoderConfig) -> Float[Array, "B T D"]:
    """The states that meet the unembedding.

        norm(act(W h + c))

    params: the encoder's whole tree. hidden: [B, T, D], of the encoder's `forward`. Result: as hidden; the norm is
    computed in float32. Raises ValueError if the encoder has no such head.

    Source: Devlin et al. 2018, arXiv:1810.04805, as in the released code (the paper does not mention it).
    """
    head = _config(cfg)
    y = layers.ACTIVATIONS[head.activation](layers.project(params["masked_lm"]["dense"], hidden))
    return layer_norm(params["masked_lm"]["norm"], y, cfg=cfg)


def head(params: Params, *, cfg: EncoderConfig) -> dict[str, Array | None]:
    """The unembedding, as keyword arguments of `jaxlm.ops.token_stats`: unembed [V, D] (the embeddings), bias [V].

    Raises ValueError if the encoder has no such head.
    """
    _config(cfg)
    return {"unembed": params["embed"]["table"], "bias": params["masked_lm"].get("bias")}


def _config(cfg: EncoderConfig) -> MaskedLMConfig:
    if cfg.masked_lm is None:
        raise ValueError(
            "the encoder has no masked-LM head (masked_lm=None): load a checkpoint that has one and ties it to the "
            "embeddings, or give EncoderConfig a MaskedLMConfig"
        )
    return cfg.masked_lm
