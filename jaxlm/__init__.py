"""jaxlm: train language models in JAX with pure functions, on a laptop CPU or a TPU pod."""

__version__ = "0.1.0"
