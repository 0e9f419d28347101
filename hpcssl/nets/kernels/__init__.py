"""Kernels of batch normalization that ``nets/norm.py`` is built from: plain tensor code, and faster ones for GPUs."""
