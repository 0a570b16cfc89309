"""The pieces of a transformer block, each a pure function of its own parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.models.config import DecoderConfig, EncoderConfig
from jaxlm.ops.matmul import matmul
from jaxlm.typing import Array, Float, Key, Params

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], *, eps: float, offset: float = 0.0
) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32, returned in x's dtype. Source: arXiv 1910.07467."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], bias: Float[Array, "D"] | None, *, eps: float
) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(var + eps) * scale + bias, in float32, returned in x's dtype. Source: arXiv 1607.06450."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def norm(params: Params, x: Float[Array, "... D"], *, cfg: DecoderConfig) -> Float[Array, "... D"]:
    """The norm that the config names."""
    if cfg.norm == "layer":
        return layer_norm(x, params["scale"], params["bias"], eps=cfg.norm_eps)
    return rms_norm(x, params["scale"], eps=cfg.norm_eps, offset=cfg.norm_offset)


def project(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T ..."]:
    """x times a kernel [D, …], plus its bias if it has one; the kernel is cast to x's dtype."""
    kernel = params["kernel"]
    flat = _product(params, x, kernel.reshape(kernel.shape[0], -1))
    y = flat.reshape(*x.shape[:-1], *kernel.shape[1:])
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def project_heads(params: Params, x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """The heads joined and projected back to the width, plus the bias if there is one."""
    kernel = params["kernel"]
    y = _product(params, x.reshape(*x.shape[:2], -1), kernel.reshape(-1, kernel.shape[-1]))
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def _product(params: Params, x: Float[Array, "B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """x times the kernel, plus (x A) B where `jaxlm.models.lora.join` put an adapter beside it."""
    y = matmul(x, kernel)
    if "lora_a" not in params:
        return y
    a, b = params["lora_a"].reshape(kernel.shape[0], -1), params["lora_b"].reshape(-1, kernel.shape[1])
    return y + matmul(matmul(x, a), b)


def qk_norm(params: Params, x: Float[Array, "B T N H"], *, cfg: DecoderConfig) -> Float[Array, "B T N H"]:
    """Normalises queries or keys, head by head ("head") or all heads together ("full")."""
    if cfg.qk_norm == "head":
        return rms_norm(x, params["scale"], eps=cfg.norm_eps, offset=cfg.norm_offset)
    joined = x.reshape(*x.shape[:2], -1)
    return rms_norm(joined, params["scale"], eps=cfg.norm_eps, offset=cfg.norm_offset).reshape(x.shape)


def mlp_hidden(
    params: Params, x: Float[Array, "B T D"], *, cfg: DecoderConfig | EncoderConfig
) -> Float[Array, "B T F"]:
    """The feed-forward coefficients: act(x W_gate) * x W_up, or act(x W_up) without a gate."""
    act = ACTIVATIONS[cfg.activation]
    if cfg.mlp_gated:
        return act(project(params["gate"], x)) * project(params["up"], x)
    return act(project(params["up"], x))


def dropout(
    x: Float[Array, "B ..."], rate: float, keys: Key[Array, "B"] | None, site: int | Array
) -> Float[Array, "B ..."]:
    """Zeroes entries with probability `rate` and scales the rest by 1/(1 - rate); keys None or rate 0: the identity.

    Each row draws from its own key, so the mask does not depend on how the batch is split.
    """
    if keys is None or rate == 0.0:
        return x
    keys = jax.vmap(lambda key: jax.random.fold_in(key, site))(keys)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
