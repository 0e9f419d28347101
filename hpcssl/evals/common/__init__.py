"""What several evaluations share: features, images, options, resume files, and stopping together."""
