"""Recipes: what a run does, wired from the packages below."""
