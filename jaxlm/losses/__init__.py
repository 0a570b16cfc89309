"""Loss functions: pure, unreduced, importable alone (this loads jax and nothing heavier)."""

from jaxlm.losses.lm import bits_per_byte, cross_entropy, next_token_nll, seq_logprob, z_loss

__all__ = ["bits_per_byte", "cross_entropy", "next_token_nll", "seq_logprob", "z_loss"]
