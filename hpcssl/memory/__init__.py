"""The memory bank: rows that past steps have pushed, kept on all ranks, and exact nearest-neighbor search over them."""
