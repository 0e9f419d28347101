"""What a run may start from instead of random weights: a weights file, or a checkpoint of another run."""
