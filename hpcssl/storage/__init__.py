"""Folders of a run that may disappear, and the records in its files."""
