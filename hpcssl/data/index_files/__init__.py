"""The index files of a shard folder."""
