"""What is checked and resolved before a run folder or a job exists, over all packages that read a recipe."""
