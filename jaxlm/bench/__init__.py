"""Benchmarks that users run on their own machine: jaxlm bench."""
