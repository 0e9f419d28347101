"""SLURM and its local replacement: batch scripts, options, job states, code snapshots and permissions."""
