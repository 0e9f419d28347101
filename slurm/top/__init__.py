"""``hpcssl-submit top``: all runs of some folders on one screen, with keys that act on them. Imports no torch."""
