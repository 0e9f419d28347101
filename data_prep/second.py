"""A stand-in for a second modality: the edges of the image itself.

It lets the cross-modal method run where no second camera, depth map or sketch was taken. It holds nothing that the
image does not hold, so results with it are no results of cross-modal learning: wherever it is reported it is called
a surrogate.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_prep import images
from hpcssl.data.decode import decode

NONE, CHOICES = "none", ("none", "edges")
EDGES = (-2, 0)
"""``Sample.second`` of a sample whose edges are computed when it is written."""
NAMES = {"edges": "edges (surrogate)"}


def edges(image: bytes) -> bytes:
    """Gradient magnitude of an encoded image as an 8-bit gray PNG of the same size.

    Sobel's 3x3 kernels on the luma (ITU-R 601), border pixels repeated, a quarter of the length of the gradient: an
    upright step from black to white gives 255. Decoded by the decoder that training reads with, so that both are
    turned upright by the same rule; the PNG itself carries no orientation, and takes a byte per pixel. Raises
    ``Damaged``.
    """
    from scipy import ndimage  # scikit-learn brings it; only the writers of edges wait for it

    luma = np.asarray(Image.fromarray(decode(image)).convert("L"), np.int16)
    square = sum(ndimage.sobel(luma, axis, mode="nearest").astype(np.float32) ** 2 for axis in (0, 1))
    # sums of squares stay below 2^24, so float32 is exact up to the root, which IEEE 754 rounds alike everywhere
    scaled = np.minimum(np.rint(np.sqrt(square) / 4), 255).astype(np.uint8)
    return images.png(Image.fromarray(scaled))
