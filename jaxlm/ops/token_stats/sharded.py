"""token_stats over a mesh: tokens split over some axes, the vocabulary over another, one device's numbers."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlm.ops.token_stats.contract import (
    Options,
    Output,
    TokenStats,
    blank,
    check_options,
    check_outputs,
    check_shapes,
    of_tokens,
    silence,
)
from jaxlm.ops.token_stats.dispatch import KERNELS, best
from jaxlm.ops.token_stats.head import Head
from jaxlm.ops.token_stats.tiled import tiled
from jaxlm.typing import Array, Bool, Float, Int


def token_stats_sharded(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "B T *K"],
    *,
    mesh: Mesh,
    token_axes: tuple[Any, Any],
    vocab_axis: str | None,
    width_axis: str | None = None,
    mask: Bool[Array, "B T"] | None = None,
    bias: Float[Array, "V"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    outputs: Collection[Output] = ("logprob", "entropy"),
    implementation: str | None = None,
) -> TokenStats:
    """`token_stats` on a mesh: value and gradient are those of one device.

    Each device holds its tokens and its shard of the vocabulary; what crosses the vocabulary axis is one maximum and
    one fused sum of [tokens] numbers forward, and the gradient of hidden backward. Over the token axes, the gradient
    of unembed is summed once. Where unembed is split over its width too (FSDP), its rows are gathered a block at a time
    in both passes, in the dtype of hidden, and the gradient's are summed and scattered in float32.

    mesh: the mesh. token_axes: the mesh axes over which B and T are split, as in a PartitionSpec: each a name, a tuple
    of names, or None. vocab_axis: the mesh axis over which V is split, or None. width_axis: that over which D of
    unembed is split, or None; one of the token axes, whose devices hold different tokens. All other arguments, the
    result (split like the tokens) and the numerics are those of `token_stats`; implementation: any but "dense".
    Axes of the mesh that are named nowhere hold copies. Call it inside `jax.jit` on a mesh with Auto axes.

    Source: the vocabulary-parallel softmax of Shoeybi et al. 2019, arXiv:1909.08053, section 3, with the entropy's
    accumulator added.
    """
    targets = jnp.asarray(targets)
    check_shapes(hidden, unembed, targets, mask=mask, bias=bias, several=True)
    _check_split(mesh, "vocab_axis", vocab_axis, "vocabulary", unembed.shape[0])
    for name, axes, size in zip(("B", "T"), token_axes, targets.shape):
        _check_split(mesh, "token_axes", axes, name, size)
    _check_split(mesh, "width_axis", width_axis, "width", unembed.shape[1])
    if width_axis is not None and not any(width_axis in _names(axes) for axes in token_axes):
        raise ValueError(f"width_axis={width_axis!r}: expected one of token_axes, found {token_axes}")
    outputs = check_outputs(outputs)
    options = check_options(
        unembed, bias=bias, temperature=temperature, soft_cap=soft_cap, logit_scale=logit_scale, valid_vocab=valid_vocab
    )

    if implementation not in (None, "tiled", *KERNELS):
        known = ", ".join(("tiled", *KERNELS))
        raise ValueError(f"implementation: expected one of {known}, or None, on a mesh; found {implementation!r}")

    def local(hidden, unembed, targets, mask, bias, temperature):
        start = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * unembed.shape[0]
        flat = targets.reshape(-1, *targets.shape[2:]) - start
        here = Head(hidden, unembed, bias, None)
        chosen = implementation or best(here, options.soft_cap, flat, outputs, whole=True)
        stats = tiled(
            hidden.reshape(-1, hidden.shape[-1]),
            unembed,
            flat,
            mask=None if mask is None else mask.reshape(-1),
            outputs=outputs,
            axis=vocab_axis,
            width_axis=width_axis,
            kernel=KERNELS.get(chosen),
            **Options(bias, temperature, options.soft_cap)._asdict(),
        )
        return of_tokens(stats, targets.shape[:2])

    tokens, vocab, table = P(*token_axes), P(vocab_axis), P(vocab_axis, width_axis)
    run = jax.shard_map(local, mesh=mesh, in_specs=(tokens, table, tokens, tokens, vocab, P()), out_specs=tokens)
    return silence(run(blank(hidden, mask), unembed, targets, mask, options.bias, options.temperature), mask)


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _check_split(mesh: Mesh, argument: str, axes: Any, what: str, size: int) -> None:
    names = _names(axes)
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(f"{argument}: expected axes of the mesh {tuple(mesh.shape)}, found {unknown}")
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
        raise ValueError(
            f"{argument}: the {what} of {size} does not divide over the {parts} devices of {names}; "
            f"pad it to {-(-size // parts) * parts}, or split it over fewer devices"
        )
