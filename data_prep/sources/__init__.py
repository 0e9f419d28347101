"""Where images come from: each module lists the samples of one kind of source as a catalog."""
