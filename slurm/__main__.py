"""``python -m slurm`` runs ``hpcssl-submit``."""

from slurm.cli import main

if __name__ == "__main__":
    main()
