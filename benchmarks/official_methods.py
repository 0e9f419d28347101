"""The official run of each method: its class, its ``train`` and its optimizer, combined as in its main function."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.official_code import Clone, OfficialRun, StandIn, TorchWithOrders, split_over_gpus, stub
from hpcssl import rng
from hpcssl.train.recipe import Recipe
from hpcssl.train.train_state import TrainState


def sgd(parameters, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer that all official main functions build."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def split(training: TrainState, *networks: nn.Module) -> None:
    """Give networks as many parts of the batch as our recipe has groups of the norms."""
    model = training.recipe.model
    if model.norm == "ghost":
        for network in networks:
            split_over_gpus(network, training.recipe.optim.batch // model.norm_group_size)


# -- MSF and CMSF -----------------------------------------------------------------------------------------------------

TRAINED = {"backbone.": "encoder_q.body.", "projector.": "encoder_q.fc."}
MEAN_SHIFT = TRAINED | {"predictor.": "predict_q."}
MEAN_SHIFT_SLOW = {"backbone.": "encoder_t.body.", "projector.": "encoder_t.fc."}


def mean_shift(module: types.ModuleType, cls: type, training: TrainState, *more, **options) -> OfficialRun:
    """Return a model of the MSF family with its own rates and ``train``, called with ``more``; its bank equals ours."""
    recipe, bank = training.recipe, training.bank
    if recipe.model.shuffle_bn:
        cls.forward.__globals__["get_shuffle_ids"].__globals__["torch"] = TorchWithOrders(training)
    model = cls("resnet_tiny", m=recipe.method.ema.momentum, mem_bank_size=bank.size, topk=recipe.method.k, **options)
    args = options.get("opt", SimpleNamespace())
    vars(args).update(learning_rate=recipe.optim.lr, epochs=recipe.schedule.epochs, cos=True, print_freq=10**9)
    optimizer = sgd([p for p in model.parameters() if p.requires_grad], args.learning_rate)
    model.queue.copy_(bank.all_rows("key"))
    split(training, model.encoder_q, model.encoder_t, model.predict_q)

    def epoch(number, loader):
        module.adjust_learning_rate(number + 1, args, optimizer)
        module.train(number + 1, loader, model, optimizer, args, *more)

    def form(batch):
        return torch.from_numpy(batch.index), tuple(batch.images), torch.from_numpy(batch.label)

    return OfficialRun(
        model,
        epoch,
        form,
        MEAN_SHIFT,
        MEAN_SHIFT_SLOW,
        lambda: (model.queue, int(model.queue_ptr)),
        lambda _: {"bank's label": model.labels},
    )


def msf(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    module = clone.load("train_msf.py")
    return mean_shift(module, module.MeanShift, training)


def sup(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    module = clone.load("supervised/train_cmsf_sup.py")
    return mean_shift(module, module.MeanShift, training)


def sup_first_release(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    module = clone.load("supervised/train_sup_msf.py")
    return mean_shift(module, module.MeanShift, training)


def two_queues(clone: Clone, training: TrainState, order: Tensor) -> OfficialRun:
    module = clone.load("self_supervised/train_cmsf_self.py")
    return _two_queues(module, module.ConstrainedMeanShiftSelf, training, order)


def two_queues_first_release(clone: Clone, training: TrainState, order: Tensor) -> OfficialRun:
    module = clone.load("self_supervised/train_msf_2q.py")
    module.ConstrainedMeanShift2Q.num_queues = 2
    module.nn_dist_q = torch.empty(training.recipe.optim.batch, training.recipe.method.k)
    return _two_queues(module, module.ConstrainedMeanShift2Q, training, order)


def _two_queues(module: types.ModuleType, cls: type, training: TrainState, order: Tensor) -> OfficialRun:
    """Start both runs after one epoch.

    Two embeddings of each image are known, and the bank holds the newer ones of the last images of ``order``.
    """
    embedding_table, bank = training.memories["embedding_table"], training.bank
    older, newer = (
        nn.functional.normalize(torch.randn(len(embedding_table.all_rows()[1]), bank.columns["key"].dim), dim=1)
        for _ in range(2)
    )
    index = order[-bank.size :]
    embedding_table.write(torch.arange(len(newer)), newer)
    bank.push(
        key=newer[index],
        index=index,
        label=torch.full_like(index, -1),
        previous_epoch=older[index],
        group=torch.zeros_like(index),
    )
    side = mean_shift(module, cls, training, dataset_size=len(newer), topkp=training.recipe.method.k_constraint)
    model = side.model
    model.pool.copy_(torch.stack((older, newer)))
    model.index_queue.copy_(index)

    def extra(_step):
        at = torch.arange(len(newer))
        return {
            "bank's label": model.labels,
            "embedding_table": model.pool[1 - model.pool_qindex, at],
            "bank's previous_epoch": model.pool[model.pool_qindex[model.index_queue], model.index_queue],
        }

    side.extra = extra
    return side


def clusters(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    module = clone.load("self_supervised/train_msf_km.py")
    cls = module.ConstrainedMeanShiftKM
    module.DCMeanShift = cls
    module.nn_dist_q = torch.empty(training.recipe.optim.batch, training.recipe.method.k)
    side = mean_shift(
        module,
        cls,
        training,
        dataset_size=len(training.memories["embedding_table"].all_rows()[1]),
        num_clusters=training.recipe.method.num_clusters,
    )
    model, train = side.model, side.epoch
    model.pool.zero_()  # the value of our unknown rows; it is never read before it is written

    def epoch(number, loader):
        train(number, loader)
        module.faiss = cpu_faiss(training, training.steps_per_epoch * (number + 1))
        model.cluster()

    side.epoch = epoch
    side.extra = lambda _: {
        "bank's label": model.labels,
        "embedding_table": model.pool,
        "clusters": model.pseudo_labels,
    }
    return side


def cpu_faiss(training: TrainState, step: int) -> SimpleNamespace:
    """Return faiss without GPUs, whose k-means starts from the same rows as ours at ``step``."""
    import faiss

    def clustering(width, count):
        options = faiss.ClusteringParameters()
        options.seed = rng.key(training.recipe.seed, "kmeans", step) & 0x7FFFFFFF
        options.min_points_per_centroid = 1  # it warns below 39 points
        return faiss.Clustering(width, count, options)

    return SimpleNamespace(
        Clustering=clustering,
        IndexFlatL2=faiss.IndexFlatL2,
        GpuMultipleClonerOptions=SimpleNamespace,
        index_cpu_to_all_gpus=lambda index, _: index,
    )


# -- MoCo v2, SimSiam -------------------------------------------------------------------------------------------------


def moco(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    module, recipe, bank = clone.load("main_moco.py"), training.recipe, training.bank
    builder = clone.load("moco/builder.py")
    model = builder.MoCo(
        StandIn,
        dim=bank.columns["key"].dim,
        K=bank.size,
        m=recipe.method.ema.momentum,
        T=recipe.method.temperature,
        mlp=True,
    )
    if recipe.model.shuffle_bn:
        builder.torch = TorchWithOrders(training)
    split(training, model.encoder_q, model.encoder_k)
    args = SimpleNamespace(lr=recipe.optim.lr, epochs=recipe.schedule.epochs, cos=True, gpu=None, print_freq=10**9)
    optimizer, criterion = sgd(model.parameters(), args.lr), nn.CrossEntropyLoss()
    module.accuracy = lambda *_, **__: (torch.zeros(1), torch.zeros(1))
    model.queue.copy_(bank.all_rows("key").T)

    def epoch(number, loader):
        module.adjust_learning_rate(optimizer, number, args)
        module.train(loader, model, criterion, optimizer, number, args)

    slow = {ours: theirs.replace("encoder_q", "encoder_k") for ours, theirs in TRAINED.items()}
    return OfficialRun(
        model,
        epoch,
        lambda batch: (list(batch.images), batch.label),
        TRAINED,
        slow,
        lambda: (model.queue.T, int(model.queue_ptr)),
    )


def simsiam(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    module, recipe = clone.load("main_simsiam.py"), training.recipe
    builder = clone.load("simsiam/builder.py")
    model = builder.SimSiam(StandIn, dim=recipe.model.projector.out, pred_dim=recipe.model.predictor.hidden[0])
    nn.init.zeros_(model.encoder.fc[6].bias)
    args = SimpleNamespace(epochs=recipe.schedule.epochs, gpu=None, print_freq=10**9)
    optimizer = sgd(
        [
            {"params": model.encoder.parameters(), "fix_lr": False},
            {"params": model.predictor.parameters(), "fix_lr": True},
        ],
        recipe.optim.lr,
    )
    criterion = nn.CosineSimilarity(dim=1)

    def epoch(number, loader):
        module.adjust_learning_rate(optimizer, recipe.optim.lr, number, args)
        module.train(loader, model, criterion, optimizer, number, args)

    return OfficialRun(
        model,
        epoch,
        lambda batch: (list(batch.images), batch.label),
        {"backbone.": "encoder.body.", "projector.": "encoder.fc.", "predictor.": "predictor."},
    )


# -- CMSF with pseudo-labels ------------------------------------------------------------------------------------------


def semi(clone: Clone, training: TrainState, order: Tensor) -> OfficialRun:
    """Start both runs after one epoch, with every labeled image in the cache of the head; theirs is in epoch order."""
    module = clone.load("semi_supervised/train_pseudo_cmsf.py")
    recipe, options = training.recipe, training.recipe.method.pseudo_labels
    head, labeled = training.memories["head"], training.memories["labeled"]
    ring = order[labeled.is_visible(order)]
    place = ring.argsort()  # position in the ring of each labeled image, by its number
    rows = nn.functional.normalize(torch.randn(len(ring), recipe.model.projector.out), dim=1)
    labeled.write(ring, rows)
    opt = SimpleNamespace(
        topk_lbl=1,
        use_conf=True,
        conf_th=options.threshold,
        sup_mem_bank_size=len(ring),
        cache_sup=True,
        cache_conf_unsup=False,
        batch_size=recipe.optim.batch,
        pseudo_lbl_lr=options.lr,
        pseudo_lbl_momentum=0.9,
        pseudo_lbl_weight_decay=options.weight_decay,
        pseudo_lbl_lr_schedule="15,30,40",
        pseudo_lbl_epochs=options.epochs,
        pseudo_batch_size=options.batch,
    )
    side = mean_shift(
        module, module.PseudoCMSF, training, None, None, mlp_xent="mlp", ncls=head.net[-1].out_features, opt=opt
    )
    model, form, train = side.model, side.form, side.epoch
    model.mlp_head.load_state_dict(head.net.state_dict())
    model.sup_queue.copy_(rows)
    model.sup_labels.copy_(labeled.known_rows()[1][place.argsort()])
    learn = module.train_pseudo_lbl
    learn.__globals__["torch"] = _TorchWithOurOrder(training, place)

    def epoch(number, loader):
        train(number, loader)
        learn(model, None, model.encoder_t, model.mlp_head, None, opt)

    def extra(_step):
        return {
            "bank's label": model.gt_labels,
            "bank's group": model.labels,
            "labeled": model.sup_queue[place],
            "head": torch.cat([p.flatten() for p in model.mlp_head.parameters()]),
        }

    side.form = lambda batch: (*form(batch), (~labeled.is_visible(torch.from_numpy(batch.index))).int())
    side.epoch, side.extra = epoch, extra
    return side


class _TorchWithOurOrder:
    """torch with a ``randperm`` that returns the order in which our head sees the same rows."""

    def __init__(self, training: TrainState, place: Tensor):
        self.training, self.place, self.calls = training, place, 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def randperm(self, rows: int) -> Tensor:
        training, per_epoch = self.training, self.training.steps_per_epoch
        turn, epoch = divmod(self.calls, training.recipe.method.pseudo_labels.epochs)
        self.calls += 1
        step = turn // 2 * per_epoch + (per_epoch if turn % 2 else per_epoch // 2)
        return self.place[torch.from_numpy(rng.permutation(rng.key(training.recipe.seed, "pseudo", step, epoch), rows))]


# -- SwAV -------------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A network with the interface of a data-parallel wrapper."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.module(crops)


def swav(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    recipe, options, steps = training.recipe, training.recipe.method, training.steps_per_epoch
    module = clone.load(
        "main_swav.py",
        stubs={name: stub(name) for name in ("apex", "apex.parallel", "pandas")}
        | {"apex.parallel.LARC": stub("apex.parallel.LARC", LARC=None)},
    )
    net, width = _multi_crop(module.resnet_models, training), recipe.model.projector.out
    model, queue = Wrapped(net), []
    optimizer = sgd(net.parameters(), recipe.optim.lr)
    total = steps * recipe.schedule.epochs
    rates = recipe.optim.lr * 0.5 * (1 + np.cos(np.pi * np.arange(total) / total))
    if recipe.optim.name == "larc":
        optimizer.param_groups[0]["weight_decay"] = recipe.optim.weight_decay
        larc = Clone(clone.root.parent / "NVIDIA-apex")
        optimizer = larc.load("apex/parallel/LARC.py").LARC(optimizer, trust_coefficient=0.001, clip=False)
        clone.digests.update(larc.digests)
        rates = _swav_rates(recipe, steps)
    if recipe.model.norm == "ghost":
        _split_crops(net, recipe.optim.batch // recipe.model.norm_group_size)
    module.args = SimpleNamespace(
        crops_for_assign=[0, 1],
        nmb_crops=[2, recipe.views.crops.count],
        temperature=options.temperature,
        world_size=1,
        epsilon=options.epsilon,
        sinkhorn_iterations=options.sinkhorn_iterations,
        use_fp16=False,
        rank=1,  # rank 0 writes a log
        freeze_prototypes_niters=options.freeze_steps,
    )

    def epoch(number, loader):
        if number == options.queue_start_epoch:
            queue.append(torch.zeros(2, training.bank.size, width, dtype=training.dtype))
        module.train(loader, model, optimizer, number, rates, queue[0] if queue else None)

    def finish_step():
        with torch.no_grad():
            net.prototypes.weight.copy_(nn.functional.normalize(net.prototypes.weight, dim=1))

    def extra(step):
        """Return the queue in the order of our slots; empty until it is full, since ours then holds earlier rows."""
        if not queue or not queue[0][0, -1].any():
            return {}
        blocks = queue[0].unflatten(1, (-1, recipe.optim.batch))
        slots = blocks[:, [(step - slot) % blocks.shape[1] for slot in range(blocks.shape[1])]].flatten(1, 2)
        return {"bank": slots[0], "bank's second_view": slots[1]}

    names = {
        "backbone.": "module.body.",
        "projector.": "module.projection_head.",
        "predictor.vectors.": "module.prototypes.",
    }
    return OfficialRun(model, epoch, lambda batch: list(batch.images), names, extra=extra, finish_step=finish_step)


def _swav_rates(recipe: Recipe, steps: int) -> np.ndarray:
    """The rate of every step, as main_swav.py computes it."""
    schedule, peak = recipe.schedule, recipe.optim.lr
    warm, left = int(schedule.warmup_epochs), schedule.epochs - int(schedule.warmup_epochs)
    rising = np.linspace(schedule.warmup_lr, peak, steps * warm)
    share = np.arange(steps * left) / (steps * left)
    falling = schedule.final_lr + 0.5 * (peak - schedule.final_lr) * (1 + np.cos(np.pi * share))
    return np.concatenate((rising, falling))


def _split_crops(net: nn.Module, groups: int) -> None:
    """Make a network pass its crops in parts, as apex's SyncBN over groups of GPUs; outputs are ordered by crop."""
    split_over_gpus(net, groups)
    by_part = net.forward

    def forward(crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows, parts = len(crops[0]), by_part(list(crops))  # in each part: crop by crop
        width = rows // groups
        order = [
            part * width * len(crops) + crop * width + row
            for crop in range(len(crops))
            for part in range(groups)
            for row in range(width)
        ]
        return tuple(output[order] for output in parts)

    net.forward = forward


def _multi_crop(resnets: types.ModuleType, training: TrainState) -> nn.Module:
    """Return the official network with our backbone: its own passes over crops, projector and prototypes."""
    model, prototypes = training.recipe.model, training.recipe.method.prototypes
    net = resnets.ResNet(
        resnets.BasicBlock,
        [1, 1, 1, 1],
        normalize=True,
        hidden_mlp=model.projector.hidden[0],
        output_dim=model.projector.out,
        nmb_prototypes=prototypes,
    )
    stand_in = StandIn()
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
        delattr(net, name)
    net.body, net.forward_backbone = stand_in.body, lambda x: net.body(x)
    net.projection_head[0] = nn.Linear(stand_in.fc.in_features, model.projector.hidden[0])
    return net


# -- the comparisons -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method: our recipe with overrides, the folder of the clone, the official run, and the changes that it needs.

    ``more_clones`` are folders beside that of the clone which it needs as well.
    """

    recipe: str
    overrides: tuple[str, ...]
    clone: str
    build: Callable[[Clone, TrainState, Tensor], OfficialRun]
    notes: tuple[str, ...] = ()
    more_clones: tuple[str, ...] = ()


EMA = "it updates its average at the start of the forward pass, ours at the end of the previous step: compared as used"
TIES = "among equal distances, as those set to 5.0, the lowest slots are taken: torch does not specify the choice"
FILL = "method.legacy_fill=true"
SHUFFLE = "model.shuffle_bn=true"
BEFORE = "both start from a bank and pool after one epoch: in its first epoch it searches noise, ours does not"
PURITY = "its purity block reads an undefined tensor: one of that shape is provided"
CASES = {
    "msf": Case("digits_msf", (SHUFFLE,), "UMBCvision-MSF", msf, (EMA,)),
    "cmsf_2q": Case("digits_cmsf_2q", (SHUFFLE, "method.k_constraint=10"), "UCDvision-CMSF", two_queues, (EMA, BEFORE)),
    "cmsf_2q, first release": Case(
        "digits_cmsf_2q",
        (),
        "UMBCvision-CMSF",
        two_queues_first_release,
        (EMA, BEFORE, PURITY, "num_queues, which it prints and never sets, is 2"),
    ),
    "cmsf_km": Case(
        "digits_cmsf_km",
        (FILL, "method.num_clusters=12"),
        "UMBCvision-CMSF",
        clusters,
        (
            EMA,
            TIES,
            PURITY,
            "its constructor names an undefined class: an alias is provided",
            "faiss without GPUs, whose k-means starts from the same rows as ours",
        ),
    ),
    "cmsf_sup": Case(
        "digits_cmsf_sup",
        ("method.k=2",),
        "UCDvision-CMSF",
        sup,
        (EMA, "k=2, since every class has two rows: nothing is filled up"),
    ),
    "cmsf_sup, filled up": Case("digits_cmsf_sup", (FILL,), "UCDvision-CMSF", sup, (EMA, TIES)),
    "cmsf_sup, first release": Case(
        "digits_cmsf_sup",
        (FILL,),
        "UMBCvision-CMSF",
        sup_first_release,
        (EMA, TIES, "its missing folder models is provided"),
    ),
    "cmsf_semi": Case(
        "digits_cmsf_semi",
        (
            FILL,
            "method.pseudo_labels.labeled_fraction=0.4",
            "method.pseudo_labels.batch=16",
            "method.pseudo_labels.hidden=64",
            "method.pseudo_labels.threshold=0.3",
            "method.pseudo_labels.lr=0.03",
        ),
        "UCDvision-CMSF",
        semi,
        (
            EMA,
            TIES,
            "both start from the embeddings of the labeled images after one epoch: it trains empty "
            "slots of its cache as class 0",
            "its cache has one row per labeled image: none is in it twice",
            "its head sees its rows in the order that ours draws",
        ),
    ),
    "moco_v2": Case(
        "digits_moco_v2",
        ("bank.init=random", "model.projector.hidden=[128]", SHUFFLE),
        "facebookresearch-moco",
        moco,
        (
            EMA,
            "a commit that has the code, such as 7397dfe: the main branch is empty now",
            "its accuracy meter, which does not run on current torch, is left out",
        ),
    ),
    "simsiam": Case(
        "digits_simsiam",
        ("model.projector.hidden=[128,128]", "model.predictor.hidden=[16]"),
        "facebookresearch-simsiam",
        simsiam,
        ("the untrained bias before its last norm is 0: it only shifts the running mean of that norm",),
    ),
    "swav": Case(
        "digits_swav",
        ("schedule.interval=step", "method.temperature=0.1"),
        "facebookresearch-swav",
        swav,
        (
            "SGD on both sides: its LARC needs apex",
            "its prototypes are scaled to unit length before a step, ours after: compared as used",
            "its queue, newest rows first, is compared by the step of its rows, once it is full",
        ),
    ),
}
