"""Shards of two classes, and weights whose nearest neighbors are known, for pictures of neighbors."""

import io

import numpy as np
from PIL import Image

from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch


def write_shards(folder, make_shards):
    """Write black and white images, the two classes, as training and validation shards, and return them by name.

    Neighbors have the class of the query, except for two white images that are labeled black in the training set.
    """

    def images(count, swapped=()):
        samples = []
        for i in range(count):
            body = io.BytesIO()
            shade = np.full((20, 30, 3), 250 * (i % 2) + i % 5, np.uint8)
            shade[i % 20, :, :] = 128
            Image.fromarray(shade).save(body, "PNG")
            samples.append((f"{i:03d}", body.getvalue(), (i % 2) ^ (i in swapped)))
        return samples

    return {
        "train": make_shards(folder / "train", images(30, swapped=(1, 3))),
        "val": make_shards(folder / "val", images(24)),
    }


def write_weights(run):
    """Write weights of step 7 into the folder of a run."""
    arch = Arch(arch="resnet_tiny", stem="small")
    backbone = resnet.build(arch)
    resnet.initialize(backbone, 3)
    about = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": 16, "fingerprint": "f" * 64, "step": 7, "method": "msf"}
    weights.save(run.weights_at(7), backbone, arch, **about)
