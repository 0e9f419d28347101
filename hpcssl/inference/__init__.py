"""What a trained encoder is used for: features of images, search among them, and files for other programs."""
