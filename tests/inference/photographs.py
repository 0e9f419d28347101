"""A folder of photographs as people have them: mixed formats, sizes and color modes, nested by date, some broken."""

import io

import numpy as np
from PIL import Image

BROKEN = ("2018/03/a/014.jpg", "2019/02/b/007.jpg")
"""Names of the images that are empty or end early."""
_KINDS = (
    ("jpg", "JPEG", "RGB"),
    ("JPG", "JPEG", "L"),
    ("png", "PNG", "RGBA"),
    ("webp", "WEBP", "RGB"),
    ("tif", "TIFF", "RGB"),
    ("gif", "GIF", "P"),
    ("bmp", "BMP", "RGB"),
)


def write(root):
    """Write 24 images, of which 22 can be decoded, and two other files."""
    draw = np.random.default_rng(0)
    for i in range(24):
        suffix, kind, mode = _KINDS[i % len(_KINDS)]
        shade = draw.integers(0, 256, (1, 1, 3)) + draw.normal(0, 25, (*draw.integers(20, 70, 2), 3))
        body = io.BytesIO()
        Image.fromarray(shade.clip(0, 255).astype(np.uint8)).convert(mode).save(body, kind)
        path = root / str(2018 + i % 2) / f"{1 + i % 6:02d}" / "ab"[i % 2] / f"{i:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body.getvalue()[: {7: 400, 14: 0}.get(i)])
    (root / "Thumbs.db").write_bytes(b"no image")
    (root / "2018" / "._x.jpg").write_bytes(b"no image")
