"""One block of an encoder: its parameters, and attention and feed-forward, each added to the stream with its norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxlm.models import layers
from jaxlm.models.block import ATTENTION_OUT_SITE, ATTENTION_SITE, MLP_SITE, NUM_SITES, STREAM, linear_spec
from jaxlm.models.config import EncoderConfig
from jaxlm.models.rotary import Rotation
from jaxlm.models.spec import Param, Spec, ones, zeros
from jaxlm.ops import rope
from jaxlm.ops.attention import reference
from jaxlm.typing import Array, Constrain, Float, Int, Key, Params

Function = Callable[[Array], Array]


class Context(NamedTuple):
    """What every block of one call shares."""

    cfg: EncoderConfig
    rotations: dict[str, Rotation | None]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None
    keys: Key[Array, "B"] | None
    constrain: Constrain


def post_norm(x: Float[Array, "B T D"], half: Function, norm: Function) -> Float[Array, "B T D"]:
    """Half a block of BERT: norm(x + half(x)). Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1."""
    return norm(x + half(x))


def pre_norm(x: Float[Array, "B T D"], half: Function, norm: Function) -> Float[Array, "B T D"]:
    """Half a block of ModernBERT: x + half(norm(x)). Source: Xiong et al. 2020, arXiv:2002.04745."""
    return x + half(norm(x))


PLACEMENTS = {"post": post_norm, "pre": pre_norm}


def block_spec(cfg: EncoderConfig) -> Spec:
    """The parameters of one block."""
    d, n, h, f = cfg.width, cfg.num_heads, cfg.head_dim, cfg.mlp_width
    bias, mlp_bias = int(cfg.attention_bias), int(cfg.mlp_bias)
    qkv = {name: linear_spec((d, n, h), ("embed", "heads", "head_dim"), bias_dims=2 * bias) for name in ("q", "k", "v")}
    inward = ("gate", "up") if cfg.mlp_gated else ("up",)
    mlp = {name: linear_spec((d, f), ("embed", "mlp"), bias_dims=mlp_bias) for name in inward}
    return {
        "attn": qkv | {"out": linear_spec((n, h, d), ("heads", "head_dim", "embed"), bias_dims=bias)},
        "attn_norm": norm_spec(cfg),
        "mlp": mlp | {"down": linear_spec((f, d), ("mlp", "embed"), bias_dims=mlp_bias)},
        "mlp_norm": norm_spec(cfg),
    }


def norm_spec(cfg: EncoderConfig) -> Spec:
    """A LayerNorm over the width, with a bias if the config has it."""
    scale = {"scale": Param((cfg.width,), (None,), ones, decay=False)}
    return scale | ({"bias": Param((cfg.width,), (None,), zeros, decay=False)} if cfg.norm_bias else {})


def layer_norm(params: Params, x: Float[Array, "B T D"], *, cfg: EncoderConfig) -> Float[Array, "B T D"]:
    """LayerNorm with the parameters of `norm_spec`."""
    return layers.layer_norm(x, params["scale"], params.get("bias"), eps=cfg.norm_eps)


def block(
    params: Params, x: Float[Array, "B T D"], index: int | Int[Array, ""], *, kind: str, c: Context
) -> Float[Array, "B T D"]:
    """The stream after the layer of this index and kind ("global", "local"); without an attn_norm it takes x as is."""
    place = PLACEMENTS[c.cfg.norm_placement]
    norms = {name: partial(layer_norm, params[name], cfg=c.cfg) for name in ("attn_norm", "mlp_norm") if name in params}
    with jax.named_scope("attention"):
        half = partial(_attention, params["attn"], index=index, kind=kind, c=c)
        x = c.constrain(place(x, half, norms.get("attn_norm", _as_is)), STREAM)
    with jax.named_scope("mlp"):
        half = partial(_feed_forward, params["mlp"], index=index, c=c)
        return c.constrain(place(x, half, norms["mlp_norm"]), STREAM)


def _as_is(x: Array) -> Array:
    return x


def _attention(params: Params, x: Array, *, index: int | Array, kind: str, c: Context) -> Array:
    q, k, v = (layers.project(params[name], x) for name in ("q", "k", "v"))
    q, k, v = (c.constrain(a, ("batch", "length", "act_heads", None)) for a in (q, k, v))
    rotation = c.rotations[kind]
    if rotation is not None:
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
    where: dict[str, Any] = dict(
        q_positions=c.positions, k_positions=c.positions, q_segments=c.segments, k_segments=c.segments,
        scale=c.cfg.head_dim**-0.5, window=c.cfg.window if kind == "local" else None, soft_cap=None, causal=False,
    )  # fmt: skip
    weights = reference.probabilities(q, k, **where)
    weights = layers.dropout(weights, c.cfg.dropout, c.keys, NUM_SITES * index + ATTENTION_SITE)
    y = layers.project_heads(params["out"], reference.weighted_sum(weights, v))
    return layers.dropout(y, c.cfg.dropout, c.keys, NUM_SITES * index + ATTENTION_OUT_SITE)


def _feed_forward(params: Params, x: Array, *, index: int | Array, c: Context) -> Array:
    hidden = c.constrain(layers.mlp_hidden(params, x, cfg=c.cfg), ("batch", "length", "act_mlp"))
    y = layers.project(params["down"], hidden)
    return layers.dropout(y, c.cfg.dropout, c.keys, NUM_SITES * index + MLP_SITE)
