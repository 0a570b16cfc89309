"""LoRA over any decoder: low-rank adapters, a parameter tree of their own beside the frozen base.

    y = x (W + s A B)        s = alpha / rank, or alpha / sqrt(rank) with rslora

`lora_spec` derives the adapters' spec from the model's, so that `models.spec` and `sharding.rules` initialise, count,
shard and check them like any parameters. The train state's params are the adapters alone: they are what gets a
gradient, optimizer statistics and checkpoints. The base is a second argument of the jitted function (closed over, it
may be compiled in as a constant):

    loss = lambda adapters, base, batch: model_loss(join(base, adapters, cfg), batch)

`join` is for training: the forward adds the products (x A) B. `merge` is for export, evaluation and generation: it
adds s A B to the kernels once. A reference model is the base: the same function of the base itself, or, where it must
be the very same compiled one, of adapters of zeros.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlm.models.spec import Initializer, Param, Spec, flatten, zeros
from jaxlm.typing import Array, Float, Params

A, B, KERNEL = "lora_a", "lora_b", "kernel"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank: of every adapter, at least 1. alpha: positive; see `scale`. targets: the kernels that are adapted, each by
    its name in the spec ("q", "k", "v", "out", "gate", "up", "down") or the end of its path ("attn/q"); None: every
    kernel, which spares embeddings. rslora: the scale of Kalajdzievski (2023), which keeps updates the same size at
    any rank."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: expected at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha}: expected a positive number (the usual ones are 1 or 2 ranks)")
        if isinstance(self.targets, str):
            raise ValueError(f"lora.targets takes a sequence of names: write ({self.targets!r},)")

    @property
    def scale(self) -> float:
        """s = alpha / rank (Hu et al., 2021, section 4.1), or alpha / sqrt(rank) with rslora (Kalajdzievski, 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def lora_spec(spec: Spec, cfg: LoraConfig) -> Spec:
    """The adapters of a model's spec: `lora_a` and `lora_b` where the model has a targeted `kernel`.

        kernel [L, *in, *out]        lora_a [L, *in, rank]        lora_b [L, rank, *out]        (L where layers stack)

    A starts uniform within +-1/sqrt(fan-in), B at 0, so that training starts from the base exactly. Both keep the
    kernel's logical axes and are never split along the rank. Raises ValueError for a target that no kernel has.
    Source: Hu et al., 2021, arXiv 2106.09685, section 4.1, which draws A from a normal distribution; the uniform one
    is that of the released code and of `peft` (kaiming_uniform with a = sqrt(5)). There is no dropout on x before A.

    >>> spec = {"attn": {"q": {"kernel": Param((8, 2, 3), ("embed", "heads", "head_dim"), zeros)}}}
    >>> {path: p.shape for path, p in flatten(lora_spec(spec, LoraConfig(rank=4))).items()}
    {'attn/q/lora_a': (8, 4), 'attn/q/lora_b': (4, 2, 3)}
    """
    ending = f"/{KERNEL}"
    kernels = {path.removesuffix(ending): p for path, p in flatten(spec).items() if path.endswith(ending)}
    pairs = {group: _pair(kernels[group], cfg.rank) for group in _targeted(kernels, cfg.targets)}
    flat = {f"{group}/{name}": p for group, pair in pairs.items() for name, p in pair.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _targeted(groups: Collection[str], targets: Sequence[str] | None) -> list[str]:
    """The groups whose path ends in one of the targets."""
    if targets is None:
        return list(groups)
    for target in targets:
        if not any(_ends_in(group, target) for group in groups):
            raise ValueError(_unknown(target, groups))
    return [group for group in groups if any(_ends_in(group, target) for target in targets)]


def _ends_in(group: str, target: str) -> bool:
    return f"/{group}".endswith(f"/{target}")


def _unknown(target: str, groups: Collection[str]) -> str:
    names = sorted({group.rsplit("/", 1)[-1] for group in groups})
    near = difflib.get_close_matches(target, names, 1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"lora.targets: no kernel is named {target!r}; {hint}This model has {', '.join(names) or 'none'}"


def _pair(kernel: Param, rank: int) -> dict[str, Param]:
    start = int(kernel.axes[0] == "layers")
    end = start + _num_inputs(kernel.axes[start:])
    fan_in = math.prod(kernel.shape[start:end])
    return {
        A: Param((*kernel.shape[:end], rank), (*kernel.axes[:end], None), _uniform(fan_in**-0.5)),
        B: Param(
            (*kernel.shape[:start], rank, *kernel.shape[end:]), (*kernel.axes[:start], None, *kernel.axes[end:]), zeros
        ),
    }


def _num_inputs(axes: Sequence[str | None]) -> int:
    """How many axes of one layer's kernel are its input: all but the last if it writes to the width, else the first."""
    return len(axes) - 1 if axes[-1] == "embed" and axes[0] != "embed" else 1


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def join(params: Params, adapters: Params, cfg: LoraConfig) -> Params:
    """Base and adapters as one tree, for any forward: each adapted kernel's product becomes x W + (x A) (s B).

    Nothing of the base is copied or computed: this is for training, inside the function that is differentiated in
    `adapters`. Cost, per adapted kernel and token: 2 rank (in + out) FLOPs more in the forward and twice that in the
    backward; the base's own weight gradients (a third of a full step) are neither computed nor stored. Kept for the
    backward: x, which full training keeps too, and x A. The remat policies that save products keep those of the
    adapters as well, so that of each adapted kernel two outputs are saved instead of one. Numerics: A and s B are
    rounded to x's dtype like every kernel, but are not added to W before that, so that a small update of a bfloat16
    base is not lost. Raises ValueError for an adapter of another model or rank.
    """
    return _at_adapters(lambda group, pair: group | {A: pair[A], B: cfg.scale * pair[B]}, params, adapters, cfg)


def merge(params: Params, adapters: Params, cfg: LoraConfig) -> Params:
    """The plain parameters of the adapted model, W + s A B in each adapted kernel: what `hf.save` and `generate` take.

    Shapes and dtypes are those of `params`; what is not adapted is the same array. Every adapted kernel is a new array,
    and one more of its size is held while it is made; its gradient would be weight-sized too: train with `join`.
    Numerics: product and sum in float32 at the highest precision, rounded once to the kernel's dtype (in bfloat16 a
    change below 1/512 of the weight is lost: keep such a base in float32 to merge). Raises ValueError as `join`.

    >>> base = {"up": {"kernel": jnp.ones((2, 2))}}
    >>> adapters = {"up": {"lora_a": jnp.array([[1.0], [0.0]]), "lora_b": jnp.array([[3.0, 4.0]])}}
    >>> merge(base, adapters, LoraConfig(rank=1, alpha=2.0))["up"]["kernel"].tolist()
    [[7.0, 9.0], [1.0, 1.0]]
    """

    def merged(group: Params, pair: Params) -> Params:
        return group | {KERNEL: _sum(group[KERNEL], pair[A], pair[B], cfg.scale)}

    return _at_adapters(merged, params, adapters, cfg)


def _sum(
    kernel: Float[Array, "*kernel"], a: Float[Array, "*a"], b: Float[Array, "*b"], scale: float
) -> Float[Array, "*kernel"]:
    """W + scale A B over the kernel's own axes; leading axes that all three share are stacked layers."""
    stacked = a.ndim + b.ndim - 2 - kernel.ndim
    layers = tuple(range(stacked))
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    product = jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((a.ndim - 1,), (stacked,)), (layers, layers)),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (kernel.astype(dtype) + scale * product).astype(kernel.dtype)


def _at_adapters(
    f: Callable[[Params, Params], Params], params: Params, adapters: Params, cfg: LoraConfig, path: str = ""
) -> Any:
    """The parameters with `f(group, pair)` in place of every group that has a pair of A and B."""
    if A in adapters:
        _check_pair(params, adapters, cfg, path)
        return f(params, adapters)
    unknown = sorted(adapters.keys() - params.keys())
    if unknown:
        raise ValueError(
            f"there are adapters for {path}{unknown[0]}, which the parameters do not have: make them from "
            "lora_spec of this model's spec"
        )
    return {
        name: _at_adapters(f, value, adapters[name], cfg, f"{path}{name}/") if name in adapters else value
        for name, value in params.items()
    }


def _check_pair(group: Params, pair: Params, cfg: LoraConfig, path: str) -> None:
    if KERNEL not in group:
        raise ValueError(f"there is an adapter at {path}, where the parameters have no kernel")
    rank = pair[A].shape[-1]
    if rank != cfg.rank:
        raise ValueError(f"the adapter at {path} has rank {rank}, and lora.rank={cfg.rank}: give the config it has")
