"""Running trainings and evaluations as SLURM jobs, or on one machine by the same rules.

Subpackages, from the lowest: ``log`` (what was submitted, and how attempts ended), ``backend`` (SLURM and its local
replacement), ``manage`` (the state of a run), ``job`` (what runs inside a job). ``cli`` and ``submit`` use all of them.
"""
