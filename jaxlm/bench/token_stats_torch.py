"""The rivals of token_stats in PyTorch on the same GPU arrays: for `jaxlm bench token_stats --versus torch`.

linear + cross_entropy on materialised logits; where they are installed, Liger's fused linear cross-entropy (gradients
formed in the forward pass, accumulated in float32) and cut-cross-entropy (without its gradient filter).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.typing import Array

Loss = Callable[[Any, Any, Any], Any]


class Rival(NamedTuple):
    """call: one run, waited for, that returns the losses of tokens or their sum; products: of N D V it needs."""

    call: Callable[[], Any]
    products: dict[str, int]


def check_available() -> None:
    """ValueError without PyTorch or a GPU that it and JAX see."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--versus torch needs PyTorch with CUDA: pip install torch")
    import torch

    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        raise ValueError(
            "--versus torch compares on a GPU that both JAX and PyTorch see; found "
            f"{jax.default_backend()} for JAX, {'a' if torch.cuda.is_available() else 'no'} GPU for PyTorch"
        )


def rivals(hidden: Array, unembed: Array, targets: Array, *, gradients: bool) -> dict[str, Rival]:
    """Those that are installed, on the arrays themselves."""
    import torch

    h, w = (torch.from_dlpack(x.astype(hidden.dtype)).requires_grad_(gradients) for x in (hidden, unembed))
    t = torch.tensor(np.asarray(targets), device=h.device, dtype=torch.long)

    def run(loss: Loss) -> Callable[[], Any]:
        def call() -> Any:
            h.grad = w.grad = None
            with torch.set_grad_enabled(gradients):
                out = loss(h, w, t)
                if gradients:
                    out.sum().backward()
            torch.cuda.synchronize()
            return out.detach()

        return call

    return {name: Rival(run(loss), products) for name, (loss, products) in _losses().items()}


def _losses() -> dict[str, tuple[Loss, dict[str, int]]]:
    import torch

    def linear(h: Any, w: Any, t: Any) -> Any:
        return torch.nn.functional.cross_entropy((h @ w.T).float(), t, reduction="none")

    found: dict[str, tuple[Loss, dict[str, int]]] = {"torch": (linear, {"forward": 1, "forward+backward": 3})}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger(h: Any, w: Any, t: Any) -> Any:
            return liger_fused_linear_cross_entropy(h, w, t, reduction="sum", accum_dtype=torch.float32)

        found["liger"] = liger, {"forward": 1, "forward+backward": 3}
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        def cut(h: Any, w: Any, t: Any) -> Any:
            return linear_cross_entropy(h, w, t, reduction="none", filter_eps=None)

        found["cut"] = cut, {"forward": 1, "forward+backward": 4}
    return found


def measured_temp_bytes(call: Callable[[], Any]) -> int:
    """What a run holds at most beyond what was held before it, its gradients included."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
