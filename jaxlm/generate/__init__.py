"""Text generation: sampling and the batched decoding engine."""
