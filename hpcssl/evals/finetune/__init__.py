"""Fine-tuning of an encoder on labeled images."""
