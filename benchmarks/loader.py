"""The loader, compared with its peers: ``python -m benchmarks.loader --data SHARDS_OR_TAR [--out FILE]``.

One image means its decoding and two views of 224 x 224. Our loader leaves flip, jitter, blur and normalization to the
device, which is most of its advantage. The section "like for like" excludes that: decoding and cropping on both sides,
and the whole augmentation of MSF on the CPU with our code. "Ours" has the native decoder where it was built.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import simplejpeg
import torch
import typer
from torchvision.datasets import ImageFolder

from benchmarks import common, peers
from hpcssl.data.decode import ScratchBuffer, decode
from hpcssl.data.loader import Loader
from hpcssl.data.native import selection
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.views.augment import AUGMENTATIONS, ViewSpec, augment_batch

VIEWS = [
    ViewSpec(name="query", augment=AUGMENTATIONS["strong"], size=224),
    ViewSpec(name="target", augment=AUGMENTATIONS["weak"], size=224),
]
BATCH = 50


class Ours:
    """Our loader, which lives as long as a run; each turn starts its threads and continues with the next steps."""

    def __init__(
        self, images: common.Images, threads: int, steps: int, device_work: bool = False, decoder: str = "auto"
    ):
        order = Order(
            [s.samples for s in images.shards.shards], seed=0, window="all", global_batch=min(BATCH, len(images.bodies))
        )
        self.loader = Loader(Reader(images.shards), order, VIEWS, seed=0, threads=threads, decoder=decoder)
        self.steps, self.device_work, self.done = steps, device_work, 0

    def __call__(self) -> int:
        count = 0
        for batch in self.loader.iterate(self.done, self.done + self.steps):
            count += len(batch.index)
            if self.device_work:
                for x, params, view in zip(batch.images, batch.params, VIEWS, strict=True):
                    augment_batch(x, params, view.augment)
        self.done += self.steps
        return count


def for_each_image(images: common.Images, work, count: int):
    """Return a turn that applies ``work`` to one image after the other, starting again at the end of the set."""
    position = 0

    def turn() -> int:
        nonlocal position
        for _ in range(count):
            work(images.bodies[position % len(images.bodies)])
            position += 1
        return count

    return turn


def one_core(images: common.Images, rounds: int, count: int) -> dict:
    folder, place = ImageFolder(images.folder), [0]
    msf, scratch = peers.msf_views(), ScratchBuffer()

    def image_folder() -> int:
        for _ in range(count):
            msf(folder[place[0] % len(folder)][0])
            place[0] += 1
        return count

    steps = max(1, count // BATCH)
    candidates = {
        "ours": Ours(images, 1, steps),
        "ours, plain decoder": Ours(images, 1, steps, decoder="plain"),
        "ours + device work on this core": Ours(images, 1, steps, device_work=True),
        "MSF (ImageFolder, PIL)": image_folder,
        "PIL decode + two crops": for_each_image(
            images, lambda body, crop=peers.crop_views(): crop(peers.open_rgb(body)), count
        ),
        "solo-learn asymmetric": for_each_image(images, _on_pil(peers.solo_views(False)), count),
        "solo-learn symmetric": for_each_image(images, _on_pil(peers.solo_views(True)), count),
        "torchvision decode + v2 crops": for_each_image(images, peers.torchvision_views(), count),
        "full decode alone": for_each_image(images, simplejpeg.decode_jpeg, count),
        "full decode alone, into one buffer": for_each_image(images, lambda body: decode(body, scratch), count),
    }
    for name in ("SimCLRTransform", "BYOLTransform", "MoCoV2Transform"):
        if (views := peers.lightly_views(name)) is not None:
            candidates[f"lightly {name}"] = for_each_image(images, _on_pil(views), count)
    seconds = common.take_turns(candidates, rounds, time.process_time)
    gain = {name: common.ratio(seconds, "ours", name) for name in candidates if name != "ours"}
    others = [value for name, value in gain.items() if name.startswith(("solo", "lightly"))]
    limit = round(1 / gain["full decode alone"], 3)
    return {
        "one core, images per CPU second": common.rates(seconds),
        "one core, ours is times faster than": {
            **gain,
            "MSF (ImageFolder, PIL)": common.with_goal(gain["MSF (ImageFolder, PIL)"], 4.2),
            "the nearest of solo-learn and lightly": common.with_goal(min(others), 6.0),
        },
        "one core, share of the limit": {
            "rate over that of the full decode alone": common.with_goal(round(gain["full decode alone"], 3), 0.8),
            "time over that of the full decode alone": limit,
        },
        "like for like on one core": {
            "decode and crop: ours over PIL's": gain["PIL decode + two crops"],
            "all of MSF's augmentation on the CPU: ours over MSF's": common.ratio(
                seconds, "ours + device work on this core", "MSF (ImageFolder, PIL)"
            ),
        },
    }


def _on_pil(views):
    return lambda body: views(peers.open_rgb(body))


def workers(images: common.Images, dataset, count: int, shuffle: bool):
    """Return a turn of a DataLoader with two worker processes, which live on between the turns."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=shuffle, num_workers=2, persistent_workers=True, drop_last=False
    )

    def turn() -> int:
        images_read = 0
        while images_read < count:
            for batch in loader:
                images_read += len(batch[-1])
        return images_read

    return turn


def two_cores(images: common.Images, rounds: int, count: int) -> dict:
    import webdataset

    steps = max(1, count // BATCH)
    urls = [str(images.shards.path(n)) for n in range(len(images.shards.shards))]
    wds = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(peers.MsfViews(), lambda label: label)
    )
    candidates = {
        "ours, 2 threads": Ours(images, 2, steps),
        "ours, 1 thread": Ours(images, 1, steps),
        "ours, plain decoder, 2 threads": Ours(images, 2, steps, decoder="plain"),
        "ours, plain decoder, 1 thread": Ours(images, 1, steps, decoder="plain"),
        "MSF ImageFolder + DataLoader": workers(images, ImageFolder(images.folder, peers.MsfViews()), count, True),
        "webdataset decode('pil') + MSF": workers(images, wds, count, False),
    }
    seconds = common.take_turns(candidates, rounds)
    return {
        "whole loader on two cores, images/s": common.rates(seconds),
        "whole loader on two cores, ours is times faster than": {
            "MSF ImageFolder + DataLoader": common.with_goal(
                common.ratio(seconds, "ours, 2 threads", "MSF ImageFolder + DataLoader"), 5.0
            ),
            "webdataset decode('pil') + MSF": common.ratio(
                seconds, "ours, 2 threads", "webdataset decode('pil') + MSF"
            ),
            "ours with one thread": common.with_goal(common.ratio(seconds, "ours, 2 threads", "ours, 1 thread"), 1.9),
            "ours with the plain decoder": common.ratio(seconds, "ours, 2 threads", "ours, plain decoder, 2 threads"),
        },
        "two threads are times faster than one": {
            "plain decoder": common.ratio(seconds, "ours, plain decoder, 2 threads", "ours, plain decoder, 1 thread"),
        },
    }


def main(
    data: Annotated[Path, typer.Option(help="A folder of shards, or a tar of JPEG images.")],
    rounds: int = 7,
    count: Annotated[int, typer.Option(help="Images per turn.")] = 250,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    part: Annotated[str, typer.Option(help="one, two or all: which of the two comparisons.")] = "all",
) -> None:
    """Compare decoding, cropping and two views per image, in turns, in one process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        images = common.prepare(data, Path(scratch))
        body = {}
        if part in ("one", "all"):
            body |= one_core(images, rounds, count)
        if part in ("two", "all"):
            body |= two_cores(images, rounds, 2 * count)
        mean = sum(map(len, images.bodies)) / len(images.bodies) / 1000
        fault = selection.find_fault()
        decoder = f"plain decoder (native: {fault})" if fault else "native decoder"
        what = f"{len(images.bodies)} images of {mean:.0f} kB in the mean, {rounds} rounds, {decoder}"
        common.report("loader", what, body, out)


if __name__ == "__main__":
    typer.run(main)
