"""Image files as people have them: which files of a folder are images."""
