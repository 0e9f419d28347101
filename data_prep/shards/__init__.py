"""The shard files: their layout as tars, writing, reading back, and worker processes."""
