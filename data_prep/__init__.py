"""``hpcssl-shard``: from folders, archives and published data sets to WebDataset shards with an index."""
