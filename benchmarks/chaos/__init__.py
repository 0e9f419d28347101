"""A soak test: faults are injected into a training at random, and its result must not change.

``python -m benchmarks.chaos --hours H [--seed S] [--out FILE] [--faults N]`` trains MSF on scanned digits, on a
private SLURM of two nodes (``benchmarks.loopback``), with four ranks, a memory bank, a momentum encoder and a
checkpoint every 5 steps. The first training is undisturbed. Then faults are injected (``kinds``, in an order that the
seed decides, ``plan``). Whenever a training is finished, its digest is compared with that of the undisturbed one, and
the next training starts. No fault is injected after H hours or N faults; the current training is still finished. The
exit code is 1 if a digest differs or anything else violated the expectations.

Lost steps are finished steps that had to be computed again: the last step in the journal when the attempt ended, minus
the step at which the next attempt began. ``after_kill`` counts kills between two periodic saves,
``after_kill_in_a_save`` those while the newest save had no manifest yet. The report is written after every group of
faults.
"""
