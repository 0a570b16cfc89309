"""A decoder-only transformer as three functions: `spec` (its parameters), `forward` (hidden states), `head`.

The blocks are stacked on axis 0 of every parameter under `layers`; `jaxlm.models.layer_scan` runs them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.models import layers
from jaxlm.models.block import INIT_STDDEV, NUM_SITES, STREAM, Context, block, block_spec, norm_spec
from jaxlm.models.cache import KVCache
from jaxlm.models.config import DecoderConfig
from jaxlm.models.layer_scan import Layer, run_layers
from jaxlm.models.rotary import rotations
from jaxlm.models.spec import Param, Spec, normal, stack
from jaxlm.ops.masks import segment_positions
from jaxlm.typing import Array, Constrain, Float, Int, Key, Params

COLLECTABLE = ("embedding", "residual", "attention_out", "mlp_out", "mlp_hidden", "attention_probs")

REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


LayersKV = tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]] | None


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

    def table(rows: int, axis: str | None) -> Spec:
        return {"table": Param((rows, cfg.width), (axis, "embed"), normal(INIT_STDDEV))}

    tree: dict[str, Any] = {
        "embed": table(cfg.vocab_size, "vocab"),
        "layers": stack(block_spec(cfg), cfg.num_layers),
        "final_norm": norm_spec(cfg, cfg.width),
    }
    if cfg.learned_positions:
        tree["positions"] = table(cfg.max_length, None)
    if not cfg.tie_embeddings:
        tree["unembed"] = table(cfg.vocab_size, "vocab")
    return tree


def head(params: Params, *, cfg: DecoderConfig) -> dict[str, Any]:
    """The unembedding, as the keyword arguments of `jaxlm.ops.token_stats`: unembed [V, D], bias, soft_cap."""
    table = params["embed" if cfg.tie_embeddings else "unembed"]["table"]
    return {"unembed": table, "bias": None, "soft_cap": cfg.final_soft_cap}


def forward(
    params: Params,
    tokens: Int[Array, "B T"] | None,
    *,
    cfg: DecoderConfig,
    embeddings: Float[Array, "B T D"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    in_order: bool = False,
    cache: KVCache | None = None,
    collect: Sequence[str] = (),
    key: Key[Array, "..."] | None = None,
    constrain: Constrain = identity,
) -> Output:
    """Hidden states after the final norm, [B, T, D] in cfg.dtype; multiply by `head` for logits.

    tokens: ids in [0, V); one outside gives NaN. embeddings: take the place of the (scaled) token embeddings, and
    tokens may then be None. segments: documents packed in a row, 0 is padding; a token sees its own segment only.
    positions: within the segment (None: derived). in_order: the caller's promise that they are those of packing, each
    segment in one piece and its positions growing by one, so that kernels of attention may count for themselves.
    cache: the tokens continue each row at its own length; segments then only tell padding (0) from tokens, and the
    lengths grow by the tokens. Padding comes last in a row; what does not fit in the cache is dropped, so keep its
    capacity at the length you will reach.
    key: dropout, one key per row or one to be split into rows; None switches it off.
    collect: names of intermediates to return, stacked over layers on axis 0: "embedding" [B, T, D] (not stacked),
    "residual" (after each block), "attention_out" and "mlp_out" (what each adds to the residual) [L, B, T, D],
    "mlp_hidden" (feed-forward coefficients) [L, B, T, F], "attention_probs" (before dropout) [L, B, N, T, S].
    Norms, softmax and attention logits are float32. Raises ValueError for shapes and names that do not fit.
    """
    shape = _checked_shape(tokens, embeddings, cfg=cfg)
    _check_call(shape, positions, segments, cache, collect, cfg=cfg)
    q_positions, k_positions = _positions(shape, positions, segments, cache)
    context = Context(
        cfg=cfg,
        rotations=rotations(q_positions, segments, cfg=cfg),
        q_positions=q_positions,
        k_positions=k_positions,
        in_order=cache is None and (in_order or (positions is None and segments is None)),
        segments=segments,
        cache_length=None if cache is None else cache.length,
        keys=row_keys(key, shape[0]) if cfg.dropout else None,
        collect=frozenset(collect),
        constrain=constrain,
    )
    x = _embed(params, tokens, embeddings, context)
    collected = {"embedding": x} if "embedding" in collect else {}
    x, kv, stacked = _run_layers(params["layers"], x, cache, context)
    with jax.named_scope("final_norm"):
        hidden = layers.norm(params["final_norm"], x, cfg=cfg)
    return Output(hidden, _grown(cache, kv, segments, shape[1]), collected | stacked)


def _checked_shape(tokens: Array | None, embeddings: Array | None, *, cfg: DecoderConfig) -> tuple[int, int]:
    if tokens is not None and tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], found shape {tokens.shape}")
    if embeddings is None:
        if tokens is None:
            raise ValueError("forward needs tokens or embeddings, found neither")
        return tokens.shape
    if embeddings.ndim != 3 or embeddings.shape[2] != cfg.width:
        raise ValueError(f"embeddings must be [B, T, {cfg.width}], found shape {embeddings.shape}")
    if tokens is not None and tokens.shape != embeddings.shape[:2]:
        raise ValueError(f"tokens {tokens.shape} and embeddings {embeddings.shape} differ in [B, T]: pass tokens=None")
    return embeddings.shape[:2]


def _check_call(
    shape: tuple[int, int],
    positions: Array | None,
    segments: Array | None,
    cache: KVCache | None,
    collect: Sequence[str],
    *,
    cfg: DecoderConfig,
) -> None:
    for name, array in (("positions", positions), ("segments", segments)):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have the shape of tokens, {shape}; found {array.shape}")
    if cache is not None:
        _check_cache(cache, shape, positions)
    if cfg.learned_positions and shape[1] > cfg.max_length:
        raise ValueError(f"{shape[1]} tokens a row, but learned positions end at max_length={cfg.max_length}: raise it")
    if isinstance(collect, str):
        raise ValueError(f"collect takes a sequence of names: write ({collect!r},)")
    for name in collect:
        if name not in COLLECTABLE:
            near = difflib.get_close_matches(name, COLLECTABLE, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COLLECTABLE)}"
            raise ValueError(f"collect: unknown intermediate {name!r}; {hint}")


def _check_cache(cache: KVCache, shape: tuple[int, int], positions: Array | None) -> None:
    rows, capacity = cache.keys.shape[1:3]
    if positions is not None:
        raise ValueError("positions follow from the cache's lengths: leave positions None when a cache is given")
    if rows != shape[0]:
        raise ValueError(f"the cache holds {rows} rows and the tokens {shape[0]}")
    if capacity < shape[1]:
        raise ValueError(f"{shape[1]} tokens a row do not fit in a cache of {capacity}: raise init_cache's max_length")


def _positions(
    shape: tuple[int, int], positions: Array | None, segments: Array | None, cache: KVCache | None
) -> tuple[Array, Array]:
    """The positions of queries and of keys."""
    index = jnp.arange(shape[1], dtype=jnp.int32)
    if cache is not None:
        slots = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)
        return cache.length[:, None] + index, jnp.broadcast_to(slots, (shape[0], len(slots)))
    if positions is None:
        positions = jnp.broadcast_to(index, shape) if segments is None else segment_positions(segments)
    return positions, positions


def row_keys(key: Array | None, rows: int) -> Array | None:
    """One dropout key per row, from one of each or one for all; ValueError for anything else."""
    if key is None:
        return None
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (rows,)):
        raise ValueError(
            f"key must be one jax.random.key, or one for each of {rows} rows; found {key.dtype} of shape {key.shape}"
        )
    return jax.random.split(key, rows) if key.ndim == 0 else key


def embed_tokens(
    params: Params, tokens: Int[Array, "B T"], *, cfg: DecoderConfig, constrain: Constrain = identity
) -> Float[Array, "B T D"]:
    """The (scaled) embeddings of tokens in cfg.dtype: what `forward` takes as `embeddings`, positions not yet added."""
    # Every device looks all tokens of its FSDP group up in its own columns of the table, and one exchange of tokens
    # gives each its own rows whole: the table is never gathered, nor is its gradient summed over the group.
    tokens = constrain(tokens, ("batch_replicas", "length"))
    embeddings = jnp.take(params["embed"]["table"], tokens, axis=0).astype(cfg.dtype)
    embeddings = constrain(constrain(embeddings, ("batch_replicas", "length", "embed")), STREAM)
    if cfg.embed_scale is None:
        return embeddings
    # Rounded to the compute dtype first, as the released Gemma code does.
    return embeddings * jnp.asarray(cfg.embed_scale, cfg.dtype)


def _embed(params: Params, tokens: Array | None, embeddings: Array | None, c: Context) -> Array:
    cfg = c.cfg
    with jax.named_scope("embed"):
        if embeddings is None:
            assert tokens is not None  # _checked_shape
            embeddings = embed_tokens(params, tokens, cfg=cfg, constrain=c.constrain)
        x = embeddings.astype(cfg.dtype)
        if cfg.learned_positions:
            # Clipped, because padding behind a full row may point past the table, and NaN there would spread.
            x = x + jnp.take(params["positions"]["table"], c.q_positions, axis=0, mode="clip").astype(cfg.dtype)
        x = layers.dropout(x, cfg.dropout, c.keys, NUM_SITES * cfg.num_layers)
        return c.constrain(x, STREAM)


def _run_layers(
    stacked: Params, x: Array, cache: KVCache | None, c: Context
) -> tuple[Array, LayersKV, dict[str, Array]]:
    inputs = (stacked, None if cache is None else (cache.keys, cache.values), jnp.arange(c.cfg.num_layers))
    x, (kv, collected) = run_layers(
        partial(_layer, c=c), x, inputs, pattern=c.cfg.layer_pattern, scan=c.cfg.scan_layers
    )
    return x, kv, collected


def _layer(kind: str, in_scan: bool, *, c: Context) -> Layer:
    function: Callable[..., tuple[Array, Any]] = partial(block, kind=kind, c=c)
    if c.cfg.remat != "none":
        # A scan's body cannot be merged with its own recomputation, so the barrier against that would only cost time.
        function = jax.checkpoint(function, policy=REMAT_POLICIES[c.cfg.remat], prevent_cse=not in_scan)
    return lambda x, layer: function(layer[0], x, *layer[1:])


def _grown(cache: KVCache | None, kv: LayersKV, segments: Array | None, length: int) -> KVCache | None:
    if cache is None or kv is None:
        return None
    new = length if segments is None else jnp.sum(segments != 0, axis=1, dtype=jnp.int32)
    return KVCache(keys=kv[0], values=kv[1], length=cache.length + new)
