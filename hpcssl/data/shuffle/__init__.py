"""The shuffled order of the samples of an epoch."""
