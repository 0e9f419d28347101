"""The official side of each method: its class, its ``train`` and its optimiser put together as its main does it."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.official_code import Clone, Side, StandIn, stub
from hpcssl import rng
from hpcssl.train.state import Training


def sgd(parameters, lr: float) -> torch.optim.Optimizer:
    """As every one of the official main functions builds it."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


# -- MSF and CMSF -----------------------------------------------------------------------------------------------------

TRAINED = {"backbone.": "encoder_q.body.", "projector.": "encoder_q.fc."}
MEAN_SHIFT = TRAINED | {"predictor.": "predict_q."}
MEAN_SHIFT_SLOW = {"backbone.": "encoder_t.body.", "projector.": "encoder_t.fc."}


def mean_shift(module: types.ModuleType, cls: type, training: Training, *more, **options) -> Side:
    """A model of the MSF family with its own ``train``, which takes ``more``, and rates; the bank starts as ours."""
    recipe, bank = training.recipe, training.bank
    model = cls("resnet_tiny", m=recipe.method.ema.momentum, mem_bank_size=bank.size, topk=recipe.method.k, **options)
    args = options.get("opt", SimpleNamespace())
    vars(args).update(learning_rate=recipe.optim.lr, epochs=recipe.schedule.epochs, cos=True, print_freq=10**9)
    optimizer = sgd([p for p in model.parameters() if p.requires_grad], args.learning_rate)
    model.queue.copy_(bank.everything("key"))

    def epoch(number, loader):
        module.adjust_learning_rate(number + 1, args, optimizer)
        module.train(number + 1, loader, model, optimizer, args, *more)

    def form(batch):
        return torch.from_numpy(batch.index), tuple(batch.images), torch.from_numpy(batch.label)

    return Side(model, epoch, form, MEAN_SHIFT, MEAN_SHIFT_SLOW, lambda: (model.queue, int(model.queue_ptr)),
                lambda _: {"bank's label": model.labels})


def msf(clone: Clone, training: Training, _order: Tensor) -> Side:
    module = clone.load("train_msf.py")
    return mean_shift(module, module.MeanShift, training)


def sup(clone: Clone, training: Training, _order: Tensor) -> Side:
    module = clone.load("supervised/train_cmsf_sup.py")
    return mean_shift(module, module.MeanShift, training)


def sup_first(clone: Clone, training: Training, _order: Tensor) -> Side:
    module = clone.load("supervised/train_sup_msf.py")
    return mean_shift(module, module.MeanShift, training)


def twin(clone: Clone, training: Training, order: Tensor) -> Side:
    module = clone.load("self_supervised/train_cmsf_self.py")
    return _twin(module, module.ConstrainedMeanShiftSelf, training, order)


def twin_first(clone: Clone, training: Training, order: Tensor) -> Side:
    module = clone.load("self_supervised/train_msf_2q.py")
    module.ConstrainedMeanShift2Q.num_queues = 2
    module.nn_dist_q = torch.empty(training.recipe.optim.batch, training.recipe.method.k)
    return _twin(module, module.ConstrainedMeanShift2Q, training, order)


def _twin(module: types.ModuleType, cls: type, training: Training, order: Tensor) -> Side:
    """Both sides go on from an epoch before: of each image two embeddings are known, the bank holds the newer ones of
    the last images of ``order``."""
    ledger, bank = training.memories["ledger"], training.bank
    older, newer = (nn.functional.normalize(torch.randn(len(ledger.everything()[1]), bank.columns["key"].dim), dim=1)
                    for _ in range(2))
    index = order[-bank.size:]
    ledger.write(torch.arange(len(newer)), newer)
    bank.push(key=newer[index], index=index, label=torch.full_like(index, -1), twin=older[index],
              group=torch.zeros_like(index))
    side = mean_shift(module, cls, training, dataset_size=len(newer), topkp=training.recipe.method.twins)
    model = side.model
    model.pool.copy_(torch.stack((older, newer)))
    model.index_queue.copy_(index)

    def extra(_step):
        at = torch.arange(len(newer))
        return {"bank's label": model.labels, "ledger": model.pool[1 - model.pool_qindex, at],
                "bank's twin": model.pool[model.pool_qindex[model.index_queue], model.index_queue]}

    side.extra = extra
    return side


def clusters(clone: Clone, training: Training, _order: Tensor) -> Side:
    module = clone.load("self_supervised/train_msf_km.py")
    cls = module.ConstrainedMeanShiftKM
    module.DCMeanShift = cls
    module.nn_dist_q = torch.empty(training.recipe.optim.batch, training.recipe.method.k)
    side = mean_shift(module, cls, training, dataset_size=len(training.memories["ledger"].everything()[1]),
                      num_clusters=training.recipe.method.clusters)
    model, train = side.model, side.epoch
    model.pool.zero_()  # as an unknown row of ours reads; nobody reads it before it is written

    def epoch(number, loader):
        train(number, loader)
        module.faiss = cpu_faiss(training, training.steps_per_epoch * (number + 1))
        model.cluster()

    side.epoch = epoch
    side.extra = lambda _: {"bank's label": model.labels, "ledger": model.pool, "clusters": model.pseudo_labels}
    return side


def cpu_faiss(training: Training, step: int) -> SimpleNamespace:
    """faiss without GPUs, whose k-means starts from the rows that ours starts from at ``step``."""
    import faiss

    def clustering(width, count):
        options = faiss.ClusteringParameters()
        options.seed = rng.key(training.recipe.seed, "kmeans", step) & 0x7FFFFFFF
        options.min_points_per_centroid = 1  # it warns below 39
        return faiss.Clustering(width, count, options)

    return SimpleNamespace(Clustering=clustering, IndexFlatL2=faiss.IndexFlatL2,
                           GpuMultipleClonerOptions=SimpleNamespace, index_cpu_to_all_gpus=lambda index, _: index)


# -- MoCo v2, SimSiam -------------------------------------------------------------------------------------------------

def moco(clone: Clone, training: Training, _order: Tensor) -> Side:
    module, recipe, bank = clone.load("main_moco.py"), training.recipe, training.bank
    builder = clone.load("moco/builder.py")
    model = builder.MoCo(StandIn, dim=bank.columns["key"].dim, K=bank.size, m=recipe.method.ema.momentum,
                         T=recipe.method.tau, mlp=True)
    args = SimpleNamespace(lr=recipe.optim.lr, epochs=recipe.schedule.epochs, cos=True, gpu=None, print_freq=10**9)
    optimizer, criterion = sgd(model.parameters(), args.lr), nn.CrossEntropyLoss()
    module.accuracy = lambda *_, **__: (torch.zeros(1), torch.zeros(1))
    model.queue.copy_(bank.everything("key").T)

    def epoch(number, loader):
        module.adjust_learning_rate(optimizer, number, args)
        module.train(loader, model, criterion, optimizer, number, args)

    slow = {mine: his.replace("encoder_q", "encoder_k") for mine, his in TRAINED.items()}
    return Side(model, epoch, lambda batch: (list(batch.images), batch.label), TRAINED, slow,
                lambda: (model.queue.T, int(model.queue_ptr)))


def simsiam(clone: Clone, training: Training, _order: Tensor) -> Side:
    module, recipe = clone.load("main_simsiam.py"), training.recipe
    builder = clone.load("simsiam/builder.py")
    model = builder.SimSiam(StandIn, dim=recipe.model.projector.out, pred_dim=recipe.model.predictor.hidden[0])
    nn.init.zeros_(model.encoder.fc[6].bias)
    args = SimpleNamespace(epochs=recipe.schedule.epochs, gpu=None, print_freq=10**9)
    optimizer = sgd([{"params": model.encoder.parameters(), "fix_lr": False},
                     {"params": model.predictor.parameters(), "fix_lr": True}], recipe.optim.lr)
    criterion = nn.CosineSimilarity(dim=1)

    def epoch(number, loader):
        module.adjust_learning_rate(optimizer, recipe.optim.lr, number, args)
        module.train(loader, model, criterion, optimizer, number, args)

    return Side(model, epoch, lambda batch: (list(batch.images), batch.label),
                {"backbone.": "encoder.body.", "projector.": "encoder.fc.", "predictor.": "predictor."})


# -- CMSF with pseudo-labels ------------------------------------------------------------------------------------------

def semi(clone: Clone, training: Training, order: Tensor) -> Side:
    """On both sides the head's cache holds every labelled image, from an epoch before; there in the order of epochs."""
    module = clone.load("semi_supervised/train_pseudo_cmsf.py")
    recipe, options = training.recipe, training.recipe.method.pseudo
    head, labelled = training.memories["head"], training.memories["labelled"]
    ring = order[labelled.seen(order)]
    place = ring.argsort()  # of the labelled images by number, their places in the ring
    rows = nn.functional.normalize(torch.randn(len(ring), recipe.model.projector.out), dim=1)
    labelled.write(ring, rows)
    opt = SimpleNamespace(
        topk_lbl=1, use_conf=True, conf_th=options.threshold, sup_mem_bank_size=len(ring), cache_sup=True,
        cache_conf_unsup=False, batch_size=recipe.optim.batch, pseudo_lbl_lr=options.lr, pseudo_lbl_momentum=0.9,
        pseudo_lbl_weight_decay=options.weight_decay, pseudo_lbl_lr_schedule="15,30,40",
        pseudo_lbl_epochs=options.epochs, pseudo_batch_size=options.batch)
    side = mean_shift(module, module.PseudoCMSF, training, None, None, mlp_xent="mlp", ncls=head.net[-1].out_features,
                      opt=opt)
    model, form, train = side.model, side.form, side.epoch
    model.mlp_head.load_state_dict(head.net.state_dict())
    model.sup_queue.copy_(rows)
    model.sup_labels.copy_(labelled.known()[1][place.argsort()])
    learn = module.train_pseudo_lbl
    learn.__globals__["torch"] = _Ordered(training, place)

    def epoch(number, loader):
        train(number, loader)
        learn(model, None, model.encoder_t, model.mlp_head, None, opt)

    def extra(_step):
        return {"bank's label": model.gt_labels, "bank's group": model.labels, "labelled": model.sup_queue[place],
                "head": torch.cat([p.flatten() for p in model.mlp_head.parameters()])}

    side.form = lambda batch: (*form(batch), (~labelled.seen(torch.from_numpy(batch.index))).int())
    side.epoch, side.extra = epoch, extra
    return side


class _Ordered:
    """torch, whose ``randperm`` gives the orders in which our head sees the same rows."""

    def __init__(self, training: Training, place: Tensor):
        self.training, self.place, self.asked = training, place, 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def randperm(self, rows: int) -> Tensor:
        training, per_epoch = self.training, self.training.steps_per_epoch
        turn, epoch = divmod(self.asked, training.recipe.method.pseudo.epochs)
        self.asked += 1
        step = turn // 2 * per_epoch + (per_epoch if turn % 2 else per_epoch // 2)
        return self.place[torch.from_numpy(rng.permutation(rng.key(training.recipe.seed, "pseudo", step, epoch), rows))]


# -- SwAV -------------------------------------------------------------------------------------------------------------

class Wrapped(nn.Module):
    """A network as a data-parallel wrapper shows it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.module(crops)


def swav(clone: Clone, training: Training, _order: Tensor) -> Side:
    recipe, options, steps = training.recipe, training.recipe.method, training.steps_per_epoch
    module = clone.load("main_swav.py", stubs={name: stub(name) for name in ("apex", "apex.parallel", "pandas")}
                        | {"apex.parallel.LARC": stub("apex.parallel.LARC", LARC=None)})
    net, width = _multi_crop(module.resnet_models, training), training.bank.columns["key"].dim
    model, queue = Wrapped(net), []
    optimizer = sgd(net.parameters(), recipe.optim.lr)
    total = steps * recipe.schedule.epochs
    rates = recipe.optim.lr * 0.5 * (1 + np.cos(np.pi * np.arange(total) / total))
    module.args = SimpleNamespace(
        crops_for_assign=[0, 1], nmb_crops=[2, recipe.views.crops.number], temperature=options.tau, world_size=1,
        epsilon=options.epsilon, sinkhorn_iterations=options.rounds, use_fp16=False, rank=1,  # rank 0 writes a log
        freeze_prototypes_niters=options.freeze_steps)

    def epoch(number, loader):
        if number == options.queue_epoch:
            queue.append(torch.zeros(2, training.bank.size, width, dtype=training.dtype))
        module.train(loader, model, optimizer, number, rates, queue[0] if queue else None)

    def settle():
        with torch.no_grad():
            net.prototypes.weight.copy_(nn.functional.normalize(net.prototypes.weight, dim=1))

    def extra(step):
        """The queue, newest rows first, in the slots of ours; until it is full ours holds rows from before it began."""
        if not queue or not queue[0][0, -1].any():
            return {}
        blocks = queue[0].unflatten(1, (-1, recipe.optim.batch))
        slots = blocks[:, [(step - slot) % blocks.shape[1] for slot in range(blocks.shape[1])]].flatten(1, 2)
        return {"bank": slots[0], "bank's other": slots[1]}

    names = {"backbone.": "module.body.", "projector.": "module.projection_head.",
             "predictor.vectors.": "module.prototypes."}
    return Side(model, epoch, lambda batch: list(batch.images), names, extra=extra, settle=settle)


def _multi_crop(resnets: types.ModuleType, training: Training) -> nn.Module:
    """The official network with our backbone: its own passes over crops, projector and prototypes."""
    model, prototypes = training.recipe.model, training.recipe.method.prototypes
    net = resnets.ResNet(resnets.BasicBlock, [1, 1, 1, 1], normalize=True, hidden_mlp=model.projector.hidden[0],
                         output_dim=model.projector.out, nmb_prototypes=prototypes)
    stand_in = StandIn()
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
        delattr(net, name)
    net.body, net.forward_backbone = stand_in.body, lambda x: net.body(x)
    net.projection_head[0] = nn.Linear(stand_in.fc.in_features, model.projector.hidden[0])
    return net


# -- which is compared with which -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """A method: our recipe with overrides, the clone's folder, the official side, and what had to be shimmed or set."""

    recipe: str
    overrides: tuple[str, ...]
    clone: str
    build: Callable[[Clone, Training, Tensor], Side]
    notes: tuple[str, ...] = ()


EMA = "its average moves at the start of the forward pass, ours at the end of the step before: compared as used"
TIES = "among equal distances, as those set to 5.0, the lowest slots are taken: torch leaves the choice open"
FILL = "method.legacy_fill=true"
SHUFFLE = "model.shuffle=true"
BEFORE = "both sides start from a bank and pool of an epoch before: in its first epoch it searches noise, ours does not"
PURITY = "its purity block reads a tensor that is defined nowhere: one of that shape is put there"
CASES = {
    "msf": Case("digits_msf", (SHUFFLE,), "UMBCvision-MSF", msf, (EMA,)),
    "cmsf_2q": Case("digits_cmsf_2q", (SHUFFLE, "method.twins=10"), "UCDvision-CMSF", twin, (EMA, BEFORE)),
    "cmsf_2q, first release": Case("digits_cmsf_2q", (), "UMBCvision-CMSF", twin_first, (
        EMA, BEFORE, PURITY, "num_queues, which it prints and never sets, is 2")),
    "cmsf_km": Case("digits_cmsf_km", (FILL, "method.clusters=12"), "UMBCvision-CMSF", clusters, (
        EMA, TIES, PURITY, "its constructor names a class that is not there: an alias",
        "faiss without GPUs, whose k-means starts from the rows that ours starts from")),
    "cmsf_sup": Case("digits_cmsf_sup", ("method.k=2",), "UCDvision-CMSF", sup, (
        EMA, "k=2, of which nobody has fewer: nothing is filled up")),
    "cmsf_sup, filled up": Case("digits_cmsf_sup", (FILL,), "UCDvision-CMSF", sup, (EMA, TIES)),
    "cmsf_sup, first release": Case("digits_cmsf_sup", (FILL,), "UMBCvision-CMSF", sup_first, (
        EMA, TIES, "its missing folder models is given")),
    "cmsf_semi": Case("digits_cmsf_semi", (
        FILL, "method.pseudo.labelled=0.4", "method.pseudo.batch=16", "method.pseudo.hidden=64",
        "method.pseudo.threshold=0.3", "method.pseudo.lr=0.03"), "UCDvision-CMSF", semi, (
            EMA, TIES, "both sides start from the labelled images' embeddings of an epoch before: it trains empty "
            "slots of its cache as class 0", "its cache is as long as there are labelled images: none is in it twice",
            "its head sees its rows in the orders that ours draws")),
    "moco_v2": Case("digits_moco_v2", ("bank.start=random", "model.projector.hidden=[128]", SHUFFLE),
                    "facebookresearch-moco", moco, (
                        EMA, "a commit that has the code, as 7397dfe: the main branch is empty now",
                        "its accuracy meter, which does not run on current torch, is left out")),
    "simsiam": Case("digits_simsiam", ("model.projector.hidden=[128,128]", "model.predictor.hidden=[16]"),
                    "facebookresearch-simsiam", simsiam, (
                        "the untrained bias before its last norm is 0: it shifts that norm's running mean alone",)),
    "swav": Case("digits_swav", ("schedule.per=step",), "facebookresearch-swav", swav, (
        "SGD on both sides: its LARC is apex's", "its prototypes are scaled to unit length before a step, ours after: "
        "compared as used", "its queue, newest rows first, is compared by the step that rows come from, once full")),
}
