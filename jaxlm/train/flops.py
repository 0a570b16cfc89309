"""Model FLOPs of a training step by one stated definition, for MFU; the peaks are in `jaxlm.train.chips`."""

from __future__ import annotations

import math

from jaxlm.models.spec import Spec, flatten

DEFINITION = (
    "Model FLOPs per token = 6 x parameters in matrix products (the head included, tied or not; the embedding lookup, "
    "norms and biases not) + 6 x layers x heads x head_dim x sequence_length (attention scores and their use, causal: "
    "half of the square). Recomputation does not count. MFU = FLOPs per second / (devices x bf16 peak of the chip)."
)

def flops_per_token(spec: Spec, *, sequence_length: int, num_layers: int, num_heads: int, head_dim: int) -> float:
    """Model FLOPs of forward and backward per token, by `DEFINITION`."""
    return 6.0 * matmul_parameters(spec) + 6.0 * num_layers * num_heads * head_dim * sequence_length


def matmul_parameters(spec: Spec) -> int:
    """Parameters that multiply activations: kernels, and the unembedding (shared with the lookup when tied)."""
    flat = flatten(spec)
    head = "unembed/table" if "unembed/table" in flat else "embed/table"
    return sum(math.prod(p.shape) for path, p in flat.items() if path.endswith("/kernel") or path == head)
