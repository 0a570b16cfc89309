"""Meshes, the table of sharding rules, and placement."""
