"""Our methods and lightly's at equal budget: ``python -m benchmarks quality --data DIR --scratch DIR``.

DIR/train and DIR/val are shards, such as those of ``hpcssl-shard digits DIR``. Each method is trained twice per seed:
by this package, and with lightly's loss, heads and momentum update in a plain loop. Both start from the same
backbone, see the same batches with the same augmentations, and use the same optimizer and learning rates. Both
encoders are then scored by the same k-NN evaluation. Known differences of a peer are in ``DIFFERS`` and in the
report.

Finished trainings lie below --scratch, and the same command continues. lightly is optional: `pip install lightly`.
solo-learn is no peer here: it requires versions of its dependencies that pip cannot install beside this package.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import hpcssl
from benchmarks import common
from hpcssl import files
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, DataError, HpcsslError
from hpcssl.nets import weights
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe as recipes
from hpcssl.train.data import DataPipeline
from hpcssl.train.main import build_training, set_up_torch
from hpcssl.train.recipe import Recipe
from hpcssl.train.train_state import TrainState

RESULTS = Path(__file__).parent / "results" / "quality.json"
METHODS = {"byol": "byol", "simsiam": "simsiam", "simclr": "simclr", "nnclr": "nnclr", "moco_v2": "moco"}
"""Methods that lightly has too: the end of our recipe's name, and the name of the method."""
DIFFERS = {
    "byol": "Negative cosine, mean of both directions; ours, the sum of 2 - 2 cos, has 4 times the gradient.",
    "nnclr": "The support set starts with random rows; NTXentLoss also has negatives of the same view.",
    "moco": "The bank starts with random rows; that of our recipe starts empty.",
}
"""By method, what lightly does otherwise, by reading its code."""
METRICS = ("knn1", "knn20", "one_label")


def import_lightly():
    """Import what is compared of lightly: its losses, modules, utilities and heads.

    Raises:
        ConfigError: lightly is not installed.
    """
    try:
        from lightly import loss
        from lightly.models import modules, utils
        from lightly.models.modules import heads
    except ImportError as error:
        raise ConfigError(
            "python -m benchmarks quality",
            got=f"no module {error.name}",
            expected="lightly, the peer of this comparison",
            fix="pip install lightly",
        ) from error
    return loss, modules, utils, heads


def build_head(heads, width: int, options) -> nn.Module:
    """Build a head of a recipe's widths from lightly's blocks."""
    blocks = []
    for hidden in options.hidden:
        norm = nn.BatchNorm1d(hidden) if options.norm else None
        blocks.append((width, hidden, norm, nn.ReLU(), options.bias))
        width = hidden
    last = nn.BatchNorm1d(options.out, affine=options.last_affine) if options.last_norm else None
    blocks.append((width, options.out, last, None, options.last_bias))
    return heads.ProjectionHead(blocks)


class Peer(nn.Module):
    """A method of lightly's examples: backbone, projector and predictor, and their moving average where it has one.

    Args:
        training: Our state at step 0, whose backbone is copied.
        lightly: What ``import_lightly`` returns.

    """

    def __init__(self, training: TrainState, lightly):
        super().__init__()
        loss, modules, self._utils, heads = lightly
        r, online = training.recipe, training.pair.online
        self.method = r.method.name
        self.backbone = copy.deepcopy(online.backbone)
        torch.manual_seed(r.seed)
        width = next(m for m in online.projector if isinstance(m, nn.Linear)).in_features
        self.projector = build_head(heads, width, r.model.projector)
        has_predictor = self.method in ("byol", "simsiam", "nnclr")
        self.predictor = build_head(heads, r.model.projector.out, r.model.predictor) if has_predictor else None
        self.slow = None
        if self.method in ("byol", "moco"):
            self.slow = copy.deepcopy(nn.ModuleList([self.backbone, self.projector]))
            self.slow.requires_grad_(False)
        self.cosine = loss.NegativeCosineSimilarity()
        if self.method in ("simclr", "nnclr", "moco"):
            bank = (r.bank.size, r.model.projector.out) if self.method == "moco" else 0
            self.contrast = loss.NTXentLoss(temperature=r.method.temperature, memory_bank_size=bank)
        if self.method == "nnclr":
            self.neighbors = modules.NNMemoryBankModule(size=(r.bank.size, r.model.projector.out))

    def loss(self, views: list[Tensor]) -> Tensor:
        """Compute the loss of two views [b, 3, S, S], as lightly's example of the method does."""
        z = [self.projector(self.backbone(view)) for view in views]
        if self.method == "simclr":
            return self.contrast(z[0], z[1])
        if self.method == "simsiam":
            p = [self.predictor(one) for one in z]
            return 0.5 * (self.cosine(p[0], z[1].detach()) + self.cosine(p[1], z[0].detach()))
        if self.method == "nnclr":
            p = [self.predictor(one) for one in z]
            near = [self.neighbors(z[0], update=False), self.neighbors(z[1], update=True)]
            return 0.5 * (self.contrast(near[0], p[1]) + self.contrast(near[1], p[0]))
        with torch.no_grad():
            target = [self.slow[1](self.slow[0](view)) for view in views]
        if self.method == "byol":
            p = [self.predictor(one) for one in z]
            return 0.5 * (self.cosine(p[0], target[1]) + self.cosine(p[1], target[0]))
        return self.contrast(z[0], target[1])

    def update(self, momentum: float) -> None:
        """Move the average towards the trained network by lightly's ``update_momentum``."""
        if self.slow is not None:
            self._utils.update_momentum(self.backbone, self.slow[0], m=momentum)
            self._utils.update_momentum(self.projector, self.slow[1], m=momentum)


def train_peer(recipe: Recipe, folder: RunDir, lightly) -> Path:
    """Train a peer on the batches, rates and momentum of a recipe; return its weights file."""
    path = folder.root / "peer.safetensors"
    if path.exists():
        return path
    world = World.single_process()
    set_up_torch(recipe.machine, world.device)
    pipeline = DataPipeline(recipe, folder, world)
    training, loader, order = build_training(recipe, world, pipeline)
    pipeline.start_prefetch(order, 0, training.last_step, random_access=False)
    peer = Peer(training, lightly).train()
    optim = recipe.optim
    parameters = [p for p in peer.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=optim.momentum, weight_decay=optim.weight_decay)
    try:
        for batch in loader.iterate(0, training.last_step):
            lr, momentum = training.set_rates()
            sgd.param_groups[0]["lr"] = lr
            loss = peer.loss(training.images(batch))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            peer.update(momentum)
            training.step += 1
    finally:
        loader.close()
        pipeline.close()
    views = recipe.views
    about = {"mean": views.mean, "std": views.std, "size": views.size, "step": training.last_step}
    weights.save(path, peer.backbone, recipe.arch, fingerprint="", method=f"lightly {peer.method}", **about)
    return path


def score(path: Path, data: Path) -> dict[str, float]:
    """Evaluate a weights file by k-NN; accuracies in percent."""
    row = hpcssl.evaluate("knn", "k=[1,20]", weights=path, train=data / "train", val=data / "val", devices="cpu")[-1]
    return {name: row["metrics"][name] for name in METRICS}


def compare_seed(name: str, seed: int, args: argparse.Namespace, lightly) -> dict[str, dict[str, float]]:
    """Train both sides of one seed, unless it was done before, and score them with the untrained encoder."""
    overrides = [f"seed={seed}", f"data.train={args.data / 'train'}", "machine.devices=cpu"]
    overrides += [f"schedule.epochs={args.epochs}"] if args.epochs else []
    recipe = recipes.compose(name, overrides)
    folder = RunDir(args.scratch / f"{name}_epochs{recipe.schedule.epochs}_seed{seed}")
    hpcssl.train(name, *overrides, run=folder.root)  # refuses a folder with a run of other values
    record = folder.root / "quality.json"
    if not record.exists():
        paths = {
            "untrained": folder.weights_at(0),
            "ours": folder.root / files.read_record(folder.done, {"weights": str})["weights"],
            "lightly": train_peer(recipe, folder, lightly),
        }
        scores = {side: score(path, args.data) for side, path in paths.items()}
        files.atomic_write(record, json.dumps(scores))
    return json.loads(record.read_text())


def summarize(seeds: list[dict[str, dict[str, float]]]) -> dict[str, str]:
    """Return mean and deviation over seeds of each side, and of the paired difference of ours and lightly's."""

    def text(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread} [n {len(values)}]"

    table = {}
    for metric in METRICS:
        for side in ("untrained", "ours", "lightly"):
            table[f"{metric}, {side}"] = text([scores[side][metric] for scores in seeds])
        differences = [scores["ours"][metric] - scores["lightly"][metric] for scores in seeds]
        table[f"{metric}, ours - lightly"] = text(differences)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train and val, both shards")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the runs, by which a repeat continues")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--recipes", default="digits", help="prefix of the recipes (default: digits)")
    parser.add_argument("--epochs", type=int, default=0, help="default: those of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    lightly = import_lightly()
    for part in ("train", "val"):
        if not (args.data / part).is_dir():
            fix = "`hpcssl-shard digits DIR` writes both"
            raise DataError(f"--data {args.data}", got=f"no folder {part}", expected="folders train and val", fix=fix)
    body: dict[str, dict[str, object]] = {}
    for method in args.methods:
        seeds = [compare_seed(f"{args.recipes}_{method}", seed, args, lightly) for seed in args.seeds]
        body[f"{args.recipes}_{method}"] = summarize(seeds) | {"peer differs": DIFFERS.get(METHODS[method], "")}
        # after every method, so that a stop leaves what is finished
        files.atomic_write(args.scratch / "partial.json", json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    length = f"{args.epochs} epochs" if args.epochs else "the recipes' epochs"
    common.report("quality", f"k-NN after {length}, same batches, rates and seeds, ours and lightly's", body, args.out)


if __name__ == "__main__":
    try:
        main()
    except HpcsslError as error:
        sys.exit(str(error))
