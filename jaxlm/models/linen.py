"""The decoder as a Flax Linen module with the very same parameter tree, for people who train with Flax."""

from __future__ import annotations

from typing import Any

import flax.core
import flax.linen as nn
import jax.numpy as jnp

from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.models.spec import init
from jaxlm.typing import Array, Float, Int, Params


class Decoder(nn.Module):
    """`jaxlm.models.decoder` behind `init` and `apply`; {"params": tree} holds exactly the tree of `decoder.spec`.

    The module's "dropout" stream switches dropout on.

    >>> import jax
    >>> cfg = DecoderConfig(vocab_size=8, width=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, mlp_width=8)
    >>> tokens = jnp.array([[1, 2, 3]])
    >>> variables = Decoder(cfg).init(jax.random.key(0), tokens)
    >>> Decoder(cfg).apply(variables, tokens).hidden.shape
    (1, 3, 4)
    """

    cfg: DecoderConfig

    def setup(self) -> None:
        parts = decoder.spec(self.cfg)
        self.tree = {name: self.param(name, init, part) for name, part in parts.items()}

    def __call__(self, tokens: Int[Array, "B T"] | None, **options: Any) -> decoder.Output:
        """`decoder.forward`, which lists the options."""
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return decoder.forward(self._params(), tokens, cfg=self.cfg, **({"key": key} | options))

    def head(self) -> dict[str, Any]:
        """`decoder.head`: `apply(variables, method="head")`."""
        return decoder.head(self._params(), cfg=self.cfg)

    def logits(self, tokens: Int[Array, "B T"] | None, **options: Any) -> Float[Array, "B T V"]:
        """Logits in float32, soft-capped where the model says so; training uses `head` and the hot path instead."""
        head, hidden = self.head(), self(tokens, **options).hidden
        table = head["unembed"].astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        cap = head["soft_cap"]
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _params(self) -> Params:
        # Linen freezes dicts that are attributes; the functions take plain ones.
        return flax.core.unfreeze(self.tree)
