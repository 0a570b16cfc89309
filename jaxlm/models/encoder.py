"""A bidirectional encoder as functions: `spec` (its parameters), `forward` (hidden states). BERT and its relatives.

`jaxlm.models.pooling` makes sentence vectors of the hidden states; `jaxlm.models.hf_encoder` reads Hugging Face's.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.models import layers
from jaxlm.models.block import (
    ATTENTION_OUT_SITE,
    ATTENTION_SITE,
    INIT_STDDEV,
    MLP_SITE,
    NUM_SITES,
    STREAM,
    linear_spec,
)
from jaxlm.models.decoder import identity, row_keys
from jaxlm.models.spec import Param, Spec, normal, ones, stack, zeros
from jaxlm.ops.attention import reference
from jaxlm.ops.masks import segment_positions
from jaxlm.typing import Array, Constrain, Float, Int, Key, Params


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder whose blocks normalise the stream after each addition (BERT, RoBERTa, MiniLM, DistilBERT).

    max_length: learned positions that a row may use. position_offset: rows of their table before the first one
    (RoBERTa: 2). num_token_types: of the sentence-number embedding (0: none). head: the dense layer and tanh over the
    first token's state. dropout: of embeddings, attention weights and both halves of a block.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_length: int = 512
    position_offset: int = 0
    num_token_types: int = 2
    head: bool = False
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"encoder config: width={self.width} must be a multiple of num_heads={self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"encoder config: dropout must be in [0, 1), found {self.dropout}")

    @property
    def head_dim(self) -> int:
        """Entries of one attention head."""
        return self.width // self.num_heads


@flax.struct.dataclass
class Output:
    """hidden: [B, T, D] after the last block. states: [L + 1, B, T, D], the embeddings and every block's (or None)."""

    hidden: Float[Array, "B T D"]
    states: Float[Array, "S B T D"] | None


def spec(cfg: EncoderConfig) -> Spec:
    """Every parameter of the encoder: shapes, logical axes, initialisers (normal with standard deviation 0.02)."""
    tree: dict[str, Any] = {
        "embed": _table(cfg.vocab_size, cfg.width, "vocab"),
        "positions": _table(cfg.position_offset + cfg.max_length, cfg.width, None),
        "embed_norm": _norm(cfg.width),
        "layers": stack(_block_spec(cfg), cfg.num_layers),
    }
    if cfg.num_token_types:
        tree["token_types"] = _table(cfg.num_token_types, cfg.width, None)
    if cfg.head:
        tree["head"] = linear_spec((cfg.width, cfg.width), ("embed", None), bias_dims=1)
    return tree


def _table(rows: int, width: int, axis: str | None) -> Spec:
    return {"table": Param((rows, width), (axis, "embed"), normal(INIT_STDDEV))}


def _norm(width: int) -> Spec:
    return {
        "scale": Param((width,), (None,), ones, decay=False),
        "bias": Param((width,), (None,), zeros, decay=False),
    }


def _block_spec(cfg: EncoderConfig) -> Spec:
    d, n, h, f = cfg.width, cfg.num_heads, cfg.head_dim, cfg.mlp_width
    inward = {name: linear_spec((d, n, h), ("embed", "heads", "head_dim"), bias_dims=2) for name in ("q", "k", "v")}
    return {
        "attn": inward | {"out": linear_spec((n, h, d), ("heads", "head_dim", "embed"), bias_dims=1)},
        "attn_norm": _norm(d),
        "mlp": {
            "up": linear_spec((d, f), ("embed", "mlp"), bias_dims=1),
            "down": linear_spec((f, d), ("mlp", "embed"), bias_dims=1),
        },
        "mlp_norm": _norm(d),
    }


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    cfg: EncoderConfig,
    segments: Int[Array, "B T"] | None = None,
    token_types: Int[Array, "B T"] | None = None,
    states: bool = False,
    key: Key[Array, "..."] | None = None,
    constrain: Constrain = identity,
) -> Output:
    """Hidden states [B, T, D] in cfg.dtype, every token seeing all of its own sentence, before and after it.

    tokens: ids in [0, V). segments: 0 is padding, on either side; several sentences packed in a row have numbers of
    their own, and positions restart in each. token_types: the sentence number of BERT (None: 0). states: return the
    embeddings and every block's output too. key: dropout, one key per row or one to be split into rows; None is off.
    Norms, softmax and attention logits are float32. Raises ValueError for shapes that do not fit.

    Source: Devlin et al. 2018, arXiv:1810.04805; post-norm as in the released code.
    """
    _check(tokens, segments, token_types, cfg)
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    positions = index if segments is None else segment_positions(segments)
    keys = row_keys(key, tokens.shape[0]) if cfg.dropout else None
    x = constrain(_embed(params, tokens, positions, token_types, cfg=cfg, keys=keys), STREAM)
    where: dict[str, Any] = dict(
        q_positions=positions, k_positions=positions, q_segments=segments, k_segments=segments,
        scale=cfg.head_dim**-0.5, window=None, soft_cap=None, causal=False,
    )  # fmt: skip
    block = partial(_block, cfg=cfg, where=where, keys=keys, constrain=constrain)

    def layer(x: Array, inputs: tuple[Params, Array]) -> tuple[Array, Array | None]:
        x = block(*inputs, x)
        return x, x if states else None

    inputs = (params["layers"], jnp.arange(cfg.num_layers))
    hidden, after = jax.lax.scan(layer, x, inputs, unroll=1 if cfg.scan_layers else cfg.num_layers)
    return Output(hidden, None if after is None else jnp.concatenate([x[None], after]))


def _check(tokens: Array, segments: Array | None, token_types: Array | None, cfg: EncoderConfig) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], found shape {tokens.shape}")
    for name, array in (("segments", segments), ("token_types", token_types)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens, {tokens.shape}; found {array.shape}")
    if segments is None and tokens.shape[1] > cfg.max_length:
        raise ValueError(
            f"{tokens.shape[1]} tokens a row, but learned positions end at max_length={cfg.max_length}: "
            "truncate, or pass segments if the row packs several sentences"
        )
    if token_types is not None and not cfg.num_token_types:
        raise ValueError("token_types given, but the encoder has none (num_token_types=0): leave them out")


def _embed(
    params: Params, tokens: Array, positions: Array, token_types: Array | None, *, cfg: EncoderConfig,
    keys: Array | None,
) -> Array:  # fmt: skip
    with jax.named_scope("embed"):
        x = jnp.take(params["embed"]["table"], tokens, axis=0)
        # Clipped, because padding behind a full row may point past the table, and NaN there would spread.
        x = x + jnp.take(params["positions"]["table"], cfg.position_offset + positions, axis=0, mode="clip")
        if cfg.num_token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + jnp.take(params["token_types"]["table"], types, axis=0)
        x = _layer_norm(params["embed_norm"], x.astype(cfg.dtype), cfg)
        return layers.dropout(x, cfg.dropout, keys, NUM_SITES * cfg.num_layers)


def _layer_norm(params: Params, x: Array, cfg: EncoderConfig) -> Array:
    return layers.layer_norm(x, params["scale"], params["bias"], eps=cfg.norm_eps)


def _block(
    params: Params, index: Array, x: Array, *, cfg: EncoderConfig, where: dict[str, Any], keys: Array | None,
    constrain: Constrain,
) -> Array:  # fmt: skip
    with jax.named_scope("attention"):
        q, k, v = (layers.project(params["attn"][name], x) for name in ("q", "k", "v"))
        q, k, v = (constrain(a, ("batch", "length", "act_heads", None)) for a in (q, k, v))
        weights = reference.probabilities(q, k, **where)
        weights = layers.dropout(weights, cfg.dropout, keys, NUM_SITES * index + ATTENTION_SITE)
        y = layers.project_heads(params["attn"]["out"], reference.weighted_sum(weights, v))
        y = layers.dropout(y, cfg.dropout, keys, NUM_SITES * index + ATTENTION_OUT_SITE)
        x = constrain(_layer_norm(params["attn_norm"], x + y, cfg), STREAM)
    with jax.named_scope("mlp"):
        hidden = layers.ACTIVATIONS[cfg.activation](layers.project(params["mlp"]["up"], x))
        hidden = constrain(hidden, ("batch", "length", "act_mlp"))
        y = layers.project(params["mlp"]["down"], hidden)
        y = layers.dropout(y, cfg.dropout, keys, NUM_SITES * index + MLP_SITE)
        return constrain(_layer_norm(params["mlp_norm"], x + y, cfg), STREAM)
