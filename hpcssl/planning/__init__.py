"""What comes before a training: a recipe that fits the data and the machine, a dry run, and a picture of the views."""
