"""Checkpoints: written while the training continues, complete or absent, and loaded by any number of processes."""
