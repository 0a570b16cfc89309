"""A decoder-only transformer as three functions: `spec` (its parameters), `forward` (hidden states), `head`.

The blocks are stacked on axis 0 of every parameter under `layers` and scanned, one period of the layer pattern at a
time, so that windows and rotations stay static; layers that do not fill a period follow, unrolled.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.models import cache as kv_cache
from jaxlm.models import layers
from jaxlm.models.cache import KVCache
from jaxlm.models.config import DecoderConfig, RopeConfig
from jaxlm.models.spec import Param, Spec, normal, ones, stack, zeros
from jaxlm.ops import rope as rope_ops
from jaxlm.ops.attention import attention, reference
from jaxlm.ops.masks import segment_positions
from jaxlm.typing import Array, Constrain, Float, Int, Key, Params

COLLECTABLE = ("embedding", "residual", "attention_out", "mlp_out", "mlp_hidden", "attention_probs")
INIT_STDDEV = 0.02
ATTENTION_SITE, ATTENTION_OUT_SITE, MLP_SITE, NUM_SITES = 0, 1, 2, 3

REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@flax.struct.dataclass
class Output:
    """hidden: after the final norm. cache: with the new tokens (None without one). collected: what `collect` named."""

    hidden: Float[Array, "B T D"]
    cache: KVCache | None
    collected: dict[str, Array]


def identity(x: Array, axes: tuple[str | None, ...]) -> Array:
    """The `Constrain` of one device."""
    return x


def spec(cfg: DecoderConfig) -> Spec:
    """Every parameter of the decoder: shapes, logical axes, initialisers.

    Kernels and embeddings are normal with standard deviation 0.02; the projections back into the residual stream are
    divided by sqrt(2 num_layers) (Radford et al., 2019, GPT-2, section 2.3).
    """
    tree: dict[str, Any] = {
        "embed": {"table": Param((cfg.vocab_size, cfg.width), ("vocab", "embed"), normal(INIT_STDDEV))},
        "layers": stack(_block_spec(cfg), cfg.num_layers),
        "final_norm": _norm_spec(cfg, cfg.width),
    }
    if cfg.learned_positions:
        tree["positions"] = {"table": Param((cfg.max_length, cfg.width), (None, "embed"), normal(INIT_STDDEV))}
    if not cfg.tie_embeddings:
        tree["unembed"] = {"table": Param((cfg.vocab_size, cfg.width), ("vocab", "embed"), normal(INIT_STDDEV))}
    return tree


def _norm_spec(cfg: DecoderConfig, width: int) -> Spec:
    scale = Param((width,), (None,), zeros if cfg.norm_offset == 1.0 else ones, decay=False)
    return {"scale": scale, "bias": Param((width,), (None,), zeros, decay=False)} if cfg.norm == "layer" else {"scale": scale}


def _linear_spec(shape: Sequence[int], axes: Sequence[str], bias_dims: int, *, bias: bool, residual: int = 0) -> Spec:
    """A kernel and, if asked for, a bias over its last `bias_dims` dimensions; `residual`: layers that add to one stream."""
    stddev = INIT_STDDEV / (2 * residual) ** 0.5 if residual else INIT_STDDEV
    kernel = {"kernel": Param(tuple(shape), tuple(axes), normal(stddev))}
    if not bias:
        return kernel
    # A bias over the width is small and added everywhere: it is never sharded.
    bias_axes = tuple(None if axis == "embed" else axis for axis in axes[-bias_dims:])
    return kernel | {"bias": Param(tuple(shape[-bias_dims:]), bias_axes, zeros, decay=False)}


def _block_spec(cfg: DecoderConfig) -> Spec:
    d, n, k, h, f = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.mlp_width
    attn: dict[str, Any] = {
        "q": _linear_spec((d, n, h), ("embed", "heads", "head_dim"), 2, bias=cfg.qkv_bias),
        "k": _linear_spec((d, k, h), ("embed", "kv_heads", "head_dim"), 2, bias=cfg.qkv_bias),
        "v": _linear_spec((d, k, h), ("embed", "kv_heads", "head_dim"), 2, bias=cfg.qkv_bias),
        "out": _linear_spec(
            (n, h, d), ("heads", "head_dim", "embed"), 1, bias=cfg.attention_out_bias, residual=cfg.num_layers
        ),
    }
    if cfg.qk_norm is not None:
        plain = Param((h,), (None,), zeros if cfg.norm_offset == 1.0 else ones, decay=False)
        full = cfg.qk_norm == "full"
        attn["q_norm"] = {"scale": Param((n * h,), (None,), plain.init, decay=False) if full else plain}
        attn["k_norm"] = {"scale": Param((k * h,), (None,), plain.init, decay=False) if full else plain}
    mlp: dict[str, Any] = {
        "up": _linear_spec((d, f), ("embed", "mlp"), 1, bias=cfg.mlp_bias),
        "down": _linear_spec((f, d), ("mlp", "embed"), 1, bias=cfg.mlp_bias, residual=cfg.num_layers),
    }
    if cfg.mlp_gated:
        mlp["gate"] = _linear_spec((d, f), ("embed", "mlp"), 1, bias=cfg.mlp_bias)
    before = ("attn_norm", "mlp_norm") if cfg.norm_placement in ("pre", "sandwich") else ()
    after = ("attn_post_norm", "mlp_post_norm") if cfg.norm_placement in ("post", "sandwich") else ()
    return {"attn": attn, "mlp": mlp} | {name: _norm_spec(cfg, d) for name in before + after}


def head(params: Params, *, cfg: DecoderConfig) -> dict[str, Any]:
    """The unembedding, as the keyword arguments of `jaxlm.ops.token_stats`: unembed [V, D], bias, soft_cap."""
    table = params["embed" if cfg.tie_embeddings else "unembed"]["table"]
    return {"unembed": table, "bias": None, "soft_cap": cfg.final_soft_cap}


class _Context(NamedTuple):
    """What every block of one call shares; the rotation of each kind of layer is computed once."""

    cfg: DecoderConfig
    rotations: dict[str, tuple[Array, Array] | None]
    q_positions: Array
    k_positions: Array
    segments: Array | None
    cache_length: Array | None
    keys: Array | None
    collect: frozenset[str]
    constrain: Constrain


def forward(
    params: Params,
    tokens: Int[Array, "B T"] | None,
    *,
    cfg: DecoderConfig,
    embeddings: Float[Array, "B T D"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    collect: Sequence[str] = (),
    key: Key[Array, "..."] | None = None,
    constrain: Constrain = identity,
) -> Output:
    """Hidden states after the final norm, [B, T, D] in cfg.dtype; multiply by `head` for logits.

    tokens: ids, or None with `embeddings`, which take the place of the (scaled) token embeddings. segments: documents
    packed in a row, 0 is padding; a token sees its own segment only. positions: within the segment (None: derived).
    cache: the tokens continue each row at its own length; segments then only tell padding (0) from tokens, and the
    lengths grow by the tokens. key: dropout, one key per row or one to be split into rows; None switches it off.
    collect: names of intermediates to return, stacked over layers on axis 0: "embedding" [B, T, D] (not stacked),
    "residual" (after each block), "attention_out" and "mlp_out" (what each adds to the residual) [L, B, T, D],
    "mlp_hidden" (feed-forward coefficients) [L, B, T, F], "attention_probs" [L, B, N, T, S].
    Norms, softmax and attention logits are float32. Raises ValueError for shapes and names that do not fit.
    """
    context = _context(tokens, embeddings, positions, segments, cache, collect, key, constrain, cfg=cfg)
    x = _embed(params, tokens, embeddings, context)
    collected = {"embedding": x} if "embedding" in context.collect else {}
    x, kv, stacked = _run_layers(params["layers"], x, cache, context)
    with jax.named_scope("final_norm"):
        hidden = layers.norm(params["final_norm"], x, cfg=cfg)
    if cache is not None:
        new = hidden.shape[1] if segments is None else jnp.sum(segments != 0, axis=1, dtype=jnp.int32)
        cache = KVCache(keys=kv[0], values=kv[1], length=cache.length + new)
    return Output(hidden=hidden, cache=cache, collected=collected | stacked)


def _context(
    tokens: Array | None,
    embeddings: Array | None,
    positions: Array | None,
    segments: Array | None,
    cache: KVCache | None,
    collect: Sequence[str],
    key: Array | None,
    constrain: Constrain,
    *,
    cfg: DecoderConfig,
) -> _Context:
    _check_call(tokens, embeddings, positions, segments, cache, collect, cfg=cfg)
    shape = tokens.shape if embeddings is None and tokens is not None else embeddings.shape[:2]  # type: ignore[union-attr]
    if cache is not None:
        positions = cache.length[:, None] + jnp.arange(shape[1], dtype=jnp.int32)
        k_positions = jnp.broadcast_to(jnp.arange(cache.keys.shape[2], dtype=jnp.int32), (shape[0], cache.keys.shape[2]))
    else:
        if positions is None and segments is not None:
            positions = segment_positions(segments)
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        k_positions = positions
    if key is not None and key.ndim == 0:
        key = jax.random.split(key, shape[0])
    ropes = {"global": cfg.rope, "local": cfg.rope_local or cfg.rope}
    rotations = {kind: _rotation(ropes[kind], positions, cfg=cfg) for kind in set(cfg.layer_pattern)}
    return _Context(
        cfg=cfg,
        rotations=rotations,
        q_positions=positions,
        k_positions=k_positions,
        segments=segments,
        cache_length=None if cache is None else cache.length,
        keys=key if cfg.dropout else None,
        collect=frozenset(collect),
        constrain=constrain,
    )


def _check_call(
    tokens: Array | None,
    embeddings: Array | None,
    positions: Array | None,
    segments: Array | None,
    cache: KVCache | None,
    collect: Sequence[str],
    *,
    cfg: DecoderConfig,
) -> None:
    if (tokens is None) == (embeddings is None):
        raise ValueError("forward takes either tokens or embeddings: give one and leave the other None")
    shape = tokens.shape if tokens is not None else embeddings.shape[:2]  # type: ignore[union-attr]
    if len(shape) != 2:
        raise ValueError(f"tokens must be [B, T], found shape {shape}")
    for name, array in (("positions", positions), ("segments", segments)):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have the shape of tokens, {shape}; found {array.shape}")
    if cache is not None and positions is not None:
        raise ValueError("positions follow from the cache's lengths: leave positions None when a cache is given")
    if cache is not None and cache.keys.shape[1] != shape[0]:
        raise ValueError(f"the cache holds {cache.keys.shape[1]} rows and the tokens {shape[0]}")
    if cfg.learned_positions and shape[1] > cfg.max_length:
        raise ValueError(f"{shape[1]} tokens a row, but the model has learned positions for max_length={cfg.max_length}")
    for name in collect:
        if name not in COLLECTABLE:
            near = difflib.get_close_matches(name, COLLECTABLE, 1) or [", ".join(COLLECTABLE)]
            raise ValueError(f"collect: unknown intermediate {name!r}; did you mean {near[0]}?")


def _rotation(rope: RopeConfig | None, positions: Array, *, cfg: DecoderConfig) -> tuple[Array, Array] | None:
    """cos and sin for one kind of layer; LongRoPE picks its factors by the longest position of each row."""
    if rope is None:
        return None
    rotary_dim = int(cfg.head_dim * rope.rotary_fraction)
    frequencies = rope_ops.inverse_frequencies(rotary_dim, rope.theta)
    original = rope.original_length or cfg.max_length
    scale = 1.0
    if rope.scaling == "linear":
        frequencies = rope_ops.linear_scaling(frequencies, rope.factor)
    elif rope.scaling == "llama3":
        frequencies = rope_ops.llama3_scaling(
            frequencies,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_length=original,
        )
    elif rope.scaling == "yarn":
        frequencies = rope_ops.yarn_scaling(
            frequencies,
            theta=rope.theta,
            factor=rope.factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            original_length=original,
        )
        scale = rope.attention_factor or rope_ops.yarn_attention_factor(rope.factor)
    elif rope.scaling == "longrope":
        scale = rope.attention_factor or rope_ops.longrope_attention_factor(cfg.max_length, original)
        is_long = jnp.max(positions, axis=1, keepdims=True)[..., None] >= original
        short, long = (jnp.asarray(frequencies / f, jnp.float32) for f in (rope.short_factor, rope.long_factor))
        return rope_ops.rotation(positions, jnp.where(is_long, long, short), scale)
    return rope_ops.rotation(positions, frequencies, scale)


def _embed(params: Params, tokens: Array | None, embeddings: Array | None, c: _Context) -> Array:
    cfg = c.cfg
    with jax.named_scope("embed"):
        if embeddings is None:
            embeddings = jnp.take(params["embed"]["table"], tokens, axis=0).astype(cfg.dtype)
            if cfg.embed_scale is not None:
                # Rounded to the compute dtype first, as the released Gemma code does.
                embeddings = embeddings * jnp.asarray(cfg.embed_scale, cfg.dtype)
        x = embeddings.astype(cfg.dtype)
        if cfg.learned_positions:
            x = x + jnp.take(params["positions"]["table"], c.q_positions, axis=0, mode="clip").astype(cfg.dtype)
        x = layers.dropout(x, cfg.dropout, c.keys, NUM_SITES * cfg.num_layers)
        return c.constrain(x, ("batch", "length", "act_embed"))


KV = tuple[Array, Array] | None


def _run_layers(stacked: Params, x: Array, cache: KVCache | None, c: _Context) -> tuple[Array, KV, dict[str, Array]]:
    """All blocks: whole periods of the pattern under one scan, the remainder (or everything) unrolled."""
    cfg, period = c.cfg, len(c.cfg.layer_pattern)
    kv: KV = None if cache is None else (cache.keys, cache.values)
    num_scanned = cfg.num_layers // period * period if cfg.scan_layers else 0
    block = partial(_block, c=c)
    if cfg.remat != "none":
        block = jax.checkpoint(block, policy=REMAT_POLICIES[cfg.remat], static_argnums=(3,), prevent_cse=not cfg.scan_layers)

    def group(x: Array, xs: Any) -> tuple[Array, Any]:
        outs = []
        for i, kind in enumerate(cfg.layer_pattern):
            layer_params, layer_kv, index = jax.tree.map(lambda a, i=i: a[i], xs)
            x, out = block(layer_params, x, layer_kv, kind, index)
            outs.append(out)
        return x, _stack(outs)

    inputs = (stacked, kv, jnp.arange(cfg.num_layers))
    parts = []
    if num_scanned:
        grouped = jax.tree.map(lambda a: a[:num_scanned].reshape(-1, period, *a.shape[1:]), inputs)
        x, outs = jax.lax.scan(group, x, grouped)
        parts.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outs))
    for i in range(num_scanned, cfg.num_layers):
        layer_params, layer_kv, index = jax.tree.map(lambda a, i=i: a[i], inputs)
        x, out = block(layer_params, x, layer_kv, cfg.layer_pattern[i % period], index)
        parts.append(_stack([out]))
    new_kv, collected = jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if len(parts) > 1 else parts[0]
    return x, new_kv, collected


def _stack(outs: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *outs)


def _block(params: Params, x: Array, kv: KV, kind: str, index: Array, *, c: _Context) -> tuple[Array, Any]:
    """One transformer block; returns the new residual stream and (its cache, what was collected)."""
    cfg, out = c.cfg, {}
    with jax.named_scope("attention"):
        y = layers.norm(params["attn_norm"], x, cfg=cfg) if "attn_norm" in params else x
        y, kv, probs = _attention(params["attn"], y, kv, kind, index, c)
        y = layers.norm(params["attn_post_norm"], y, cfg=cfg) if "attn_post_norm" in params else y
        y = layers.dropout(y, cfg.dropout, c.keys, NUM_SITES * index + ATTENTION_OUT_SITE)
        out["attention_out"], out["attention_probs"] = y, probs
        x = c.constrain(x + y, ("batch", "length", "act_embed"))
    with jax.named_scope("mlp"):
        y = layers.norm(params["mlp_norm"], x, cfg=cfg) if "mlp_norm" in params else x
        hidden = c.constrain(layers.mlp_hidden(params["mlp"], y, cfg=cfg), ("batch", "length", "act_mlp"))
        y = layers.project(params["mlp"]["down"], hidden)
        y = layers.norm(params["mlp_post_norm"], y, cfg=cfg) if "mlp_post_norm" in params else y
        y = layers.dropout(y, cfg.dropout, c.keys, NUM_SITES * index + MLP_SITE)
        out["mlp_hidden"], out["mlp_out"] = hidden, y
        x = c.constrain(x + y, ("batch", "length", "act_embed"))
    out["residual"] = x
    return x, (kv, {name: value for name, value in out.items() if name in c.collect})


def _attention(params: Params, x: Array, kv: KV, kind: str, index: Array, c: _Context) -> tuple[Array, KV, Array | None]:
    cfg = c.cfg
    q, k, v = (layers.project(params[name], x) for name in ("q", "k", "v"))
    q = c.constrain(q, ("batch", "length", "act_heads", None))
    k, v = (c.constrain(a, ("batch", "length", "act_kv_heads", None)) for a in (k, v))
    if cfg.qk_norm is not None:
        q, k = layers.qk_norm(params["q_norm"], q, cfg=cfg), layers.qk_norm(params["k_norm"], k, cfg=cfg)
    rotation = c.rotations[kind]
    if rotation is not None:
        q, k = rope_ops.rotate(q, *rotation), rope_ops.rotate(k, *rotation)
    if kv is not None and c.cache_length is not None:
        k, v = (kv_cache.write(old, new, c.cache_length) for old, new in zip(kv, (k, v)))
        kv = (k, v)
    # In a cache a slot is its position, and slots after a query's own are unwritten or padding: causality hides them.
    segments = None if kv is not None else c.segments
    where: dict[str, Any] = dict(
        q_positions=c.q_positions,
        k_positions=c.k_positions,
        q_segments=segments,
        k_segments=segments,
        scale=cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
        window=cfg.window if kind == "local" else None,
        soft_cap=cfg.attention_soft_cap,
    )
    probs = None
    if c.keys is not None or "attention_probs" in c.collect:
        probs = reference.probabilities(q, k.astype(q.dtype), **where)
        dropped = layers.dropout(probs, cfg.dropout, c.keys, NUM_SITES * index + ATTENTION_SITE)
        out = reference.weighted_sum(dropped, v.astype(q.dtype))
    else:
        out = attention(q, k.astype(q.dtype), v.astype(q.dtype), **where)
    out = c.constrain(out, ("batch", "length", "act_heads", None))
    return layers.project_heads(params["out"], out), kv, probs
