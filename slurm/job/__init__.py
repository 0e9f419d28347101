"""The programs that run inside a job: tasks, evaluations, requeues, and the supervisor of local jobs."""
