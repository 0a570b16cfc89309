"""Operations on arrays: no parameters, no configuration."""

from jaxlm.ops.token_stats import TokenStats, token_stats, token_stats_from_logits, token_stats_sharded

__all__ = ["TokenStats", "token_stats", "token_stats_from_logits", "token_stats_sharded"]
