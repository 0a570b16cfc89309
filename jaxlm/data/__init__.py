"""Data: from files to batches, in numpy alone (never imports jax)."""
