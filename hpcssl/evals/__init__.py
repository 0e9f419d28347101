"""Evaluations of encoders, by the published protocols of self-supervised learning."""
