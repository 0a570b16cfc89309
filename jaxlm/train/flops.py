"""Model FLOPs of a training step by one stated definition, and the peak of known chips, for MFU."""

from __future__ import annotations

import math

import jax

from jaxlm.models.spec import Spec, flatten

DEFINITION = (
    "Model FLOPs per token = 6 x parameters in matrix products (the head included, tied or not; the embedding lookup, "
    "norms and biases not) + 6 x layers x heads x head_dim x sequence_length (attention scores and their use, causal: "
    "half of the square). Recomputation does not count. MFU = FLOPs per second / (devices x bf16 peak of the chip)."
)

# device_kind -> dense bf16 FLOP/s. Google Cloud TPU documentation (system architecture pages of v4, v5e, v5p, v6e) and
# NVIDIA data sheets (A100, H100 SXM, H200 SXM, B200; dense, without sparsity). Matched as prefixes, longest first.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def flops_per_token(spec: Spec, *, sequence_length: int, num_layers: int, num_heads: int, head_dim: int) -> float:
    """Model FLOPs of forward and backward per token, by `DEFINITION`."""
    return 6.0 * matmul_parameters(spec) + 6.0 * num_layers * num_heads * head_dim * sequence_length


def matmul_parameters(spec: Spec) -> int:
    """Parameters that multiply activations: kernels, and the unembedding (shared with the lookup when tied)."""
    flat = flatten(spec)
    head = "unembed/table" if "unembed/table" in flat else "embed/table"
    return sum(math.prod(p.shape) for path, p in flat.items() if path.endswith("/kernel") or path == head)


def peak_flops(device: jax.Device | None = None) -> float | None:
    """The chip's dense bf16 peak in FLOP/s, or None where it is not in the table (a CPU, say): then there is no MFU."""
    kind = (jax.devices()[0] if device is None else device).device_kind
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
