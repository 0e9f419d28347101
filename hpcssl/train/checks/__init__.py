"""Checks of a recipe before a run folder or a job exists: keys that depend on each other, and on the data set."""
