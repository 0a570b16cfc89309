"""Evaluations, one file per subject."""
