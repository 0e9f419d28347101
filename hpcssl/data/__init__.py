"""Shard folders: reading, staging and downloading them, and batches of images for training."""
