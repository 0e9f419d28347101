"""Packaged cluster profiles (``slurm.backend.profiles``)."""
