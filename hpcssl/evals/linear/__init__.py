"""Linear classification on a frozen encoder."""
