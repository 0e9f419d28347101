"""The records of a run: submitted jobs, attempts, and whether another attempt follows."""
