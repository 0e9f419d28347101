"""``hpcssl-submit doctor``: what this cluster does, compared with what the jobs of hpcssl need."""
