"""The strong augmentation of MSF after the crop, on the CPU: ``python -m benchmarks.augmentation [--out FILE]``.

Batches of 64 uint8 views of 224 x 224, one thread: jitter .4 .4 .4 .1 in a random order per sample, gray, blur, flip,
normalization. CPU time per view. The peers are written as in the documentation of their libraries.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torchvision import transforms as T
from torchvision.transforms import v2

from benchmarks import common, peers
from hpcssl import rng
from hpcssl.views.augment import AUGMENTATIONS, PARAMS, augment_batch, draw_params

BATCH = 64


def make_views() -> torch.Tensor:
    """Return smooth random images, uint8 [N, S, S, 3]: the cost of an operation does not depend on the content."""
    coarse = torch.rand(BATCH, 3, 28, 28, generator=rng.generator(rng.key(0, "views")))
    smooth = torch.nn.functional.interpolate(coarse, (224, 224), mode="bilinear")
    return smooth.mul(255).byte().permute(0, 2, 3, 1).contiguous()


def make_kornia_chain():
    """Return the augmentation of kornia for a float batch; None if it is not installed."""
    try:
        import kornia.augmentation as K
    except ImportError:
        return None
    mean, std = torch.tensor(peers.MEAN), torch.tensor(peers.STD)
    return torch.nn.Sequential(
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((17, 17), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(p=0.5),
        K.Normalize(mean, std),
    )


def main(rounds: int = 9, out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None) -> None:
    """Compare our augmentation with PIL, torchvision v2 and kornia."""
    torch.set_num_threads(1)
    batch = make_views()
    images = [T.functional.to_pil_image(x.permute(2, 0, 1)) for x in batch]
    on_pil = T.Compose(peers.msf_after_crop())
    on_tensor = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(peers.MEAN, peers.STD),
        ]
    )
    planes = batch.permute(0, 3, 1, 2).contiguous()
    epoch = iter(range(10**9))

    def ours() -> int:
        number = next(epoch)
        rows = [draw_params(AUGMENTATIONS["strong"], rng.key(0, "view", number, n, 0), 224, 224) for n in range(BATCH)]
        augment_batch(batch, np.array(rows, PARAMS), AUGMENTATIONS["strong"])
        return BATCH

    candidates = {
        "ours": ours,
        "PIL": lambda: len([on_pil(x) for x in images]),
        "torchvision v2 on tensors": lambda: len([on_tensor(x) for x in planes]),
    }
    if (chain := make_kornia_chain()) is not None:
        candidates["kornia"] = lambda: len(chain(planes.float().div(255)))
    seconds = common.take_turns(candidates, rounds, time.process_time)
    gain = {name: common.ratio(seconds, "ours", name) for name in candidates if name != "ours"}
    gain["PIL"] = common.with_goal(gain["PIL"], 1.4)
    if "kornia" in gain:
        gain["kornia"] = common.with_goal(gain["kornia"], 3.5)
    common.report(
        "augmentation",
        f"batches of {BATCH} views, {rounds} rounds",
        {
            "ms per view": {name: round(1e3 / rate, 3) for name, rate in common.rates(seconds).items()},
            "ours is times faster than": gain,
        },
        out,
    )


if __name__ == "__main__":
    typer.run(main)
