"""A surrogate second modality: the edges of the image itself.

It lets the cross-modal method run on data sets without depth maps, sketches or a second camera. Edges hold no
information that the image lacks, so such results say nothing about cross-modal learning: wherever this modality is
reported, it is called a surrogate.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_prep.shards import images
from hpcssl.data.decode import decode

NONE, CHOICES = "none", ("none", "edges")
COMPUTE_EDGES = (-2, 0)
"""``Sample.second`` of a sample whose edges are computed when it is written."""
PROVENANCE_NAMES = {"edges": "edges (surrogate)"}
"""The name of each modality in the index of the folder."""


def compute_edges(image: bytes) -> bytes:
    """Compute the gradient magnitude of an image.

    Sobel's 3x3 kernels on the luma (ITU-R 601) with repeated border pixels, a quarter of the length of the gradient:
    an upright step from black to white gives 255. The image is decoded by the decoder that training uses, so both
    modalities are turned upright by the same rule. The PNG carries no orientation and takes one byte per pixel.

    Args:
        image: An encoded image.

    Returns:
        An 8-bit gray PNG of the same height and width.

    Raises:
        DamagedImageError: The image cannot be decoded.
    """
    from scipy import ndimage  # a dependency of scikit-learn; only this modality pays for the import

    luma = np.asarray(Image.fromarray(decode(image)).convert("L"), np.int16)
    square = sum(ndimage.sobel(luma, axis, mode="nearest").astype(np.float32) ** 2 for axis in (0, 1))
    # sums of squares stay below 2^24, so float32 is exact up to the root, which IEEE 754 rounds alike everywhere
    scaled = np.minimum(np.rint(np.sqrt(square) / 4), 255).astype(np.uint8)
    return images.encode_png(Image.fromarray(scaled))
