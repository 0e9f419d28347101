"""``hpcssl track``: sends the journal of a run to an experiment tracker, from a login node and without torch."""
