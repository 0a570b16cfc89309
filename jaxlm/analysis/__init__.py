"""Analyses of models and losses, one file per subject."""
