"""One block of a decoder: its parameters, and attention and feed-forward each added to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxlm.models import cache as kv_cache
from jaxlm.models import layers
from jaxlm.models.config import DecoderConfig
from jaxlm.models.rotary import Rotation
from jaxlm.models.spec import Param, Spec, normal, ones, zeros
from jaxlm.ops import rope
from jaxlm.ops.attention import attention, reference, spread
from jaxlm.typing import Array, Constrain, Float, Int, Key, Params

INIT_STDDEV = 0.02
# Where dropout draws within a layer: each (layer, site) is a stream of its own.
ATTENTION_SITE, ATTENTION_OUT_SITE, MLP_SITE, NUM_SITES = 0, 1, 2, 3

KV = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None
STREAM = ("batch", "length", "act_embed")


class Context(NamedTuple):
    """What every block of one call shares."""

    cfg: DecoderConfig
    rotations: dict[str, Rotation | None]
    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    in_order: bool  # each segment in one piece, its positions growing by one, without a cache
    segments: Int[Array, "B T"] | None
    cache_length: Int[Array, "B"] | None
    keys: Key[Array, "B"] | None
    collect: frozenset[str]
    constrain: Constrain


def block_spec(cfg: DecoderConfig) -> Spec:
    """The parameters of one block; the projections back into the stream start smaller by sqrt(2 num_layers)."""
    before = ("attn_norm", "mlp_norm") if cfg.norm_placement in ("pre", "sandwich") else ()
    after = ("attn_post_norm", "mlp_post_norm") if cfg.norm_placement in ("post", "sandwich") else ()
    norms = {name: norm_spec(cfg, cfg.width) for name in before + after}
    return {"attn": _attention_spec(cfg), "mlp": _mlp_spec(cfg)} | norms


def norm_spec(cfg: DecoderConfig, width: int) -> Spec:
    """A norm over the width: a scale that starts as the identity, and a bias for LayerNorm."""
    bias = {"bias": Param((width,), (None,), zeros, decay=False)} if cfg.norm == "layer" else {}
    return _scale_spec(cfg, width) | bias


def _scale_spec(cfg: DecoderConfig, width: int) -> Spec:
    return {"scale": Param((width,), (None,), zeros if cfg.norm_offset == 1.0 else ones, decay=False)}


def _attention_spec(cfg: DecoderConfig) -> Spec:
    d, n, k, h = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    out_axes, out_stddev = ("heads", "head_dim", "embed"), _residual_stddev(cfg)
    tree = {
        "q": linear_spec((d, n, h), ("embed", "heads", "head_dim"), bias_dims=2 * cfg.qkv_bias),
        "k": linear_spec((d, k, h), ("embed", "kv_heads", "head_dim"), bias_dims=2 * cfg.qkv_bias),
        "v": linear_spec((d, k, h), ("embed", "kv_heads", "head_dim"), bias_dims=2 * cfg.qkv_bias),
        "out": linear_spec((n, h, d), out_axes, bias_dims=int(cfg.attention_out_bias), stddev=out_stddev),
    }
    if cfg.qk_norm is not None:
        tree["q_norm"] = _scale_spec(cfg, h if cfg.qk_norm == "head" else n * h)
        tree["k_norm"] = _scale_spec(cfg, h if cfg.qk_norm == "head" else k * h)
    return tree


def _mlp_spec(cfg: DecoderConfig) -> Spec:
    d, f, bias_dims = cfg.width, cfg.mlp_width, int(cfg.mlp_bias)
    inward = ("gate", "up") if cfg.mlp_gated else ("up",)
    tree = {name: linear_spec((d, f), ("embed", "mlp"), bias_dims=bias_dims) for name in inward}
    down = linear_spec((f, d), ("mlp", "embed"), bias_dims=bias_dims, stddev=_residual_stddev(cfg))
    return tree | {"down": down}


def _residual_stddev(cfg: DecoderConfig) -> float:
    return INIT_STDDEV / (2 * cfg.num_layers) ** 0.5


def linear_spec(
    shape: Sequence[int], axes: Sequence[str | None], *, bias_dims: int, stddev: float = INIT_STDDEV
) -> dict[str, Param]:
    """A kernel and a bias over its last `bias_dims` dimensions (0: no bias)."""
    kernel = {"kernel": Param(tuple(shape), tuple(axes), normal(stddev))}
    if not bias_dims:
        return kernel
    # A bias over the width is small and added everywhere: it is never sharded.
    bias_axes = tuple(None if axis == "embed" else axis for axis in axes[-bias_dims:])
    return kernel | {"bias": Param(tuple(shape[-bias_dims:]), bias_axes, zeros, decay=False)}


def block(
    params: Params, x: Float[Array, "B T D"], kv: KV, index: Int[Array, ""], *, kind: str, c: Context
) -> tuple[Float[Array, "B T D"], tuple[KV, dict[str, Array]]]:
    """One layer of the given kind ("global", "local"); returns the stream, its cache, and what was collected."""
    out: dict[str, Any] = {}
    with jax.named_scope("attention"):
        y = _norm_if_present(params, "attn_norm", x, c)
        y, kv, out["attention_probs"] = _attention(params["attn"], y, kv, index, kind=kind, c=c)
        out["attention_out"] = _residual(params, "attn_post_norm", y, NUM_SITES * index + ATTENTION_OUT_SITE, c)
        x = c.constrain(x + out["attention_out"], STREAM)
    with jax.named_scope("mlp"):
        y = _norm_if_present(params, "mlp_norm", x, c)
        hidden = c.constrain(layers.mlp_hidden(params["mlp"], y, cfg=c.cfg), ("batch", "length", "act_mlp"))
        y = layers.project(params["mlp"]["down"], hidden)
        out["mlp_hidden"] = hidden
        out["mlp_out"] = _residual(params, "mlp_post_norm", y, NUM_SITES * index + MLP_SITE, c)
        x = c.constrain(x + out["mlp_out"], STREAM)
    out["residual"] = x
    return x, (kv, {name: value for name, value in out.items() if name in c.collect})


def _norm_if_present(params: Params, name: str, x: Array, c: Context) -> Array:
    return layers.norm(params[name], x, cfg=c.cfg) if name in params else x


def _residual(params: Params, norm_name: str, y: Array, site: Array, c: Context) -> Array:
    """What a half-block adds to the stream: its output, normalised where the placement says so, then dropped out."""
    return layers.dropout(_norm_if_present(params, norm_name, y, c), c.cfg.dropout, c.keys, site)


def _attention(
    params: Params, x: Array, kv: KV, index: Array, *, kind: str, c: Context
) -> tuple[Array, KV, Array | None]:
    q, k, v = _queries_keys_values(params, x, c.rotations[kind], c)
    if kv is not None and c.cache_length is not None:
        k, v = kv = (kv_cache.write(kv[0], k, c.cache_length), kv_cache.write(kv[1], v, c.cache_length))
    out, probs = _attend(q, k.astype(q.dtype), v.astype(q.dtype), index, kind=kind, c=c)
    out = c.constrain(out, ("batch", "length", "act_heads", None))
    return layers.project_heads(params["out"], out), kv, probs


def _queries_keys_values(params: Params, x: Array, rotation: Rotation | None, c: Context) -> tuple[Array, Array, Array]:
    q, k, v = (layers.project(params[name], x) for name in ("q", "k", "v"))
    q = c.constrain(q, ("batch", "length", "act_heads", None))
    k, v = (c.constrain(a, ("batch", "length", "act_kv_heads", None)) for a in (k, v))
    if c.cfg.qk_norm is not None:
        q, k = layers.qk_norm(params["q_norm"], q, cfg=c.cfg), layers.qk_norm(params["k_norm"], k, cfg=c.cfg)
    if rotation is not None:
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
    return q, k, v


def _attend(q: Array, k: Array, v: Array, index: Array, *, kind: str, c: Context) -> tuple[Array, Array | None]:
    """The heads' outputs, and the probabilities if someone asks for them or they are dropped out."""
    cfg = c.cfg
    # In a cache a slot is its position, and slots after a query's own are unwritten or padding: causality hides them.
    segments = None if c.cache_length is not None else c.segments
    where: dict[str, Any] = dict(
        q_positions=c.q_positions,
        k_positions=c.k_positions,
        q_segments=segments,
        k_segments=segments,
        scale=cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
        window=cfg.window if kind == "local" else None,
        soft_cap=cfg.attention_soft_cap,
    )
    if c.keys is None and "attention_probs" not in c.collect:
        parts = spread.parts_of(c.constrain)
        if q.shape[1] == k.shape[1] and spread.fits(q.shape[1], parts):
            return spread.attention(attention, q, k, v, parts=parts, constrain=c.constrain, **where), None
        return attention(q, k, v, in_order=c.in_order, constrain=c.constrain, **where), None
    probs = reference.probabilities(q, k, **where)
    dropped = layers.dropout(probs, cfg.dropout, c.keys, NUM_SITES * index + ATTENTION_SITE)
    return reference.weighted_sum(dropped, v), probs
