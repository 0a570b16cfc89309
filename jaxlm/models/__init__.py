"""Models: a spec of parameters and a forward function over a plain tree."""
