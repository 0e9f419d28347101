"""data_prep: images in, WebDataset shards with an index out. Its door is ``hpcssl-shard``."""
