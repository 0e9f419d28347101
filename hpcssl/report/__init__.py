"""``hpcssl report``: one page about one or several runs, as an HTML file that needs nothing else."""
