"""A bidirectional encoder as functions: `spec` (its parameters), `forward` (hidden states). BERT to ModernBERT.

`jaxlm.models.pooling` makes sentence vectors of the hidden states, `jaxlm.models.masked_lm` guesses of masked tokens;
`jaxlm.models.hf_encoder` reads Hugging Face's.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.models import layers, masked_lm
from jaxlm.models.block import INIT_STDDEV, NUM_SITES, STREAM, linear_spec
from jaxlm.models.config import EncoderConfig
from jaxlm.models.decoder import identity, row_keys
from jaxlm.models.encoder_block import Context, block, block_spec, layer_norm, norm_spec
from jaxlm.models.layer_scan import Layer, run_layers
from jaxlm.models.rotary import rotations
from jaxlm.models.spec import Param, Spec, normal, stack
from jaxlm.ops.masks import segment_positions
from jaxlm.typing import Array, Constrain, Float, Int, Key, Params


@flax.struct.dataclass
class Output:
    """hidden: [B, T, D] after the last block, and after the final norm if there is one. states: [L + 1, B, T, D], the
    embeddings and every block's, the last being `hidden` (or None)."""

    hidden: Float[Array, "B T D"]
    states: Float[Array, "S B T D"] | None


def spec(cfg: EncoderConfig) -> Spec:
    """Every parameter of the encoder: shapes, logical axes, initialisers (normal with standard deviation 0.02).

    The blocks are stacked under `layers`; of a pre-norm encoder the first, which lacks a norm, is `first`.
    """
    parts = block_spec(cfg)
    tree: dict[str, Any] = {"embed": _table(cfg.vocab_size, cfg.width, "vocab"), "embed_norm": norm_spec(cfg)}
    if cfg.rope is None:
        tree["positions"] = _table(cfg.position_offset + cfg.max_length, cfg.width, None)
    if cfg.num_token_types:
        tree["token_types"] = _table(cfg.num_token_types, cfg.width, None)
    if cfg.norm_placement == "pre":
        tree["first"] = {name: part for name, part in parts.items() if name != "attn_norm"}
        tree["final_norm"] = norm_spec(cfg)
    tree["layers"] = stack(parts, cfg.num_layers - ("first" in tree))
    if cfg.head:
        tree["head"] = linear_spec((cfg.width, cfg.width), ("embed", None), bias_dims=1)
    if cfg.masked_lm is not None:
        tree["masked_lm"] = masked_lm.spec(cfg)
    return tree


def _table(rows: int, width: int, axis: str | None) -> Spec:
    return {"table": Param((rows, width), (axis, "embed"), normal(INIT_STDDEV))}


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

    Source: Devlin et al. 2018, arXiv:1810.04805, post-norm as in the released code; with norm_placement "pre", Warner
    et al. 2024, arXiv:2412.13663.
    """
    _check(tokens, segments, token_types, cfg)
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    positions = index if segments is None else segment_positions(segments)
    keys = row_keys(key, tokens.shape[0]) if cfg.dropout else None
    turns = rotations(positions, segments, cfg=cfg)
    context = Context(cfg, turns, positions, segments, keys, constrain)
    embedded = _embed(params, tokens, token_types, context)
    hidden, after = _run(params, embedded, context, states)
    return Output(hidden, jnp.concatenate([embedded[None], *after, hidden[None]]) if states else None)


def _run(params: Params, x: Array, c: Context, states: bool) -> tuple[Array, list[Array]]:
    """The stream after the last block and norm; and, if wanted, after every block but the last."""

    def layer_of(kind: str, in_scan: bool) -> Layer:
        def layer(x: Array, inputs: tuple[Params, Array]) -> tuple[Array, Array | None]:
            x = block(inputs[0], x, inputs[1], kind=kind, c=c)
            return x, x if states else None

        return layer

    cfg, pattern = c.cfg, c.cfg.layer_pattern
    after, index = [], jnp.arange(cfg.num_layers)
    if cfg.norm_placement == "pre":
        x = block(params["first"], x, index[0], kind=pattern[0], c=c)
        after, index, pattern = [x[None]], index[1:], pattern[1:] + pattern[:1]
    x, outs = run_layers(layer_of, x, (params["layers"], index), pattern=pattern, scan=cfg.scan_layers)
    if cfg.norm_placement == "pre":
        x = layer_norm(params["final_norm"], x, cfg=cfg)
    return x, [*after, outs[:-1]] if states else []


def _check(tokens: Array, segments: Array | None, token_types: Array | None, cfg: EncoderConfig) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], found shape {tokens.shape}")
    for name, array in (("segments", segments), ("token_types", token_types)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens, {tokens.shape}; found {array.shape}")
    if cfg.rope is None and segments is None and tokens.shape[1] > cfg.max_length:
        raise ValueError(
            f"{tokens.shape[1]} tokens a row, but learned positions end at max_length={cfg.max_length}: "
            "truncate, or pass segments if the row packs several sentences"
        )
    if token_types is not None and not cfg.num_token_types:
        raise ValueError("token_types given, but the encoder has none (num_token_types=0): leave them out")


def _embed(params: Params, tokens: Array, token_types: Array | None, c: Context) -> Array:
    cfg = c.cfg
    with jax.named_scope("embed"):
        x = jnp.take(params["embed"]["table"], tokens, axis=0)
        if cfg.rope is None:
            # Clipped, because padding behind a full row may point past the table, and NaN there would spread.
            rows = cfg.position_offset + c.positions
            x = x + jnp.take(params["positions"]["table"], rows, axis=0, mode="clip")
        if cfg.num_token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + jnp.take(params["token_types"]["table"], types, axis=0)
        x = layer_norm(params["embed_norm"], x.astype(cfg.dtype), cfg=cfg)
        x = layers.dropout(x, cfg.dropout, c.keys, NUM_SITES * cfg.num_layers)
        return c.constrain(x, STREAM)
