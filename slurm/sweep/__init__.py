"""Many runs in one folder: the points of a sweep, or the recipes of a published table."""
