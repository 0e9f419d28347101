"""Object detection: Faster and Mask R-CNN fine-tuned from an encoder."""
