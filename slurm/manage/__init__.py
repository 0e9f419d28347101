"""The state of a run, and commands on it: status, waiting, cancel, preempt, logs, evaluations."""
