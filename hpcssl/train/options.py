"""Option classes of the recipe sections that belong to training as a whole, and the former names of recipe keys.

Sections that steer one package have their classes there: ``views`` and ``mix`` in ``hpcssl.views``, ``method`` in
``hpcssl.methods``, ``optim`` and ``schedule`` in ``hpcssl.optim``, ``evals`` in ``hpcssl.evals``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcssl.config import Renames
from hpcssl.errors import ConfigError
from hpcssl.nets.heads import HeadOptions


@dataclass(frozen=True, kw_only=True)
class AboutOptions:
    """What a recipe reproduces. Shown by ``hpcssl recipes`` and beside results; has no effect on training.

    Attributes:
        title: One line that names method, data and length.
        published: Scores in percent as the source prints them, by score name (``linear_top1``, ``knn20_top1``, ...).
        source: Where the published scores are printed: paper and table, or repository.
        differs: One sentence for each known difference from the original, with the reason. The sentences of a recipe
            follow those of its ``base``, unless it names another method.
    """

    title: str = ""
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""
    differs: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Training and validation images, and how they reach the processes.

    Attributes:
        train: Folder of the training shards, or an address of them such as ``https://host/train`` (see
            ``hpcssl.data.stream``). Required.
        val: Folder or address of the validation shards. Empty: none; evaluations that need them are refused.
        stage_dir: Folder on a disk of each node, to which the training shards are copied and checked once per node
            before training. Shards at an address are downloaded there shortly before they are needed, and then the
            folder is required. Empty: shards are read where they are.
        stage_limit_gb: Most gigabytes that ``stage_dir`` may hold of shards from an address. Shards that
            ``shuffle_window`` no longer needs are deleted first. 0: no limit.
        stall_timeout_seconds: A download that receives no byte for this time is aborted and tried again.
        download_attempts: How often each file is tried before the run ends with an error.
        shuffle_window: Number of shards whose images are shuffled together, as text, or ``all``. A small window reads
            the disk almost in sequence; ``all`` shuffles the whole data set.
        verify: What is compared with the index of the shards at the start of every attempt: ``sizes`` of all shard
            files, or ``sha256`` of every byte. Staged shards that differ are copied again.
        changed: What happens if shards that are read where they are hold other images than at the first attempt:
            ``refuse`` (the run ends with an error) or ``warn``.
        max_damaged: How many images that cannot be decoded are replaced by others and listed in ``damaged.jsonl``;
            one more ends the run. Each image counts once, over all processes and attempts.
    """

    train: str = ""
    val: str = ""
    stage_dir: str = ""
    stage_limit_gb: float = 0.0
    stall_timeout_seconds: float = 60.0
    download_attempts: int = 5
    shuffle_window: str = "all"
    verify: str = "sizes"
    changed: str = "refuse"
    max_damaged: int = 100

    @property
    def window_shards(self) -> int | str:
        """``shuffle_window`` as a number of shards, or ``"all"``.

        Raises:
            ConfigError: It is neither a number from 1 nor ``all``.
        """
        if self.shuffle_window == "all":
            return "all"
        if not (self.shuffle_window.isdigit() and int(self.shuffle_window) > 0):
            raise ConfigError(
                "data.shuffle_window",
                got=repr(self.shuffle_window),
                expected="a number of shards from 1, or all",
                fix="set data.shuffle_window=all",
            )
        return int(self.shuffle_window)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Backbone, heads, and the samples over which batch normalization takes its statistics.

    Attributes:
        arch: Backbone: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, or ``resnet_tiny`` for tests.
        stem: First layers: ``imagenet`` (7x7 convolution with stride 2 and max pooling) or ``small`` (3x3
            convolution with stride 1, for images of about 32 pixels).
        zero_init_residual: Whether the last norm of each residual block starts with scale 0.
        backbone_init: Initial weights of the convolutions: ``torch`` (as torchvision: normal with variance
            2 / fan-out) or ``kaiming`` (2 / fan-in, as OpenSelfSup).
        projector: The head on the backbone's pooled features.
        predictor: The head on the projection, for methods that have one.
        norm: Samples that share batch norm statistics: ``local`` (those of one process), ``sync`` (the whole global
            batch) or ``ghost`` (groups of ``norm_group_size`` samples).
        norm_group_size: Samples per group for ``norm=ghost``; ignored otherwise.
        norm_momentum: Weight of the newest batch in the running statistics, as in ``torch.nn.BatchNorm2d``.
        norm_running: Whose statistics enter the running ones, which evaluations use: the mean over ``all_groups`` of
            the batch, or those of the ``first_group``, as with PyTorch's DataParallel and DistributedDataParallel.
        shuffle_bn: Whether the target's images are assigned to norm groups at random in each step (shuffling BN of
            MoCo). Needs a target encoder that is a moving average.
        joint_forward: Whether views of one size pass the norms together, as in SwAV's code, and not one by one.
        weights: File that the backbone starts from, of this project or in another known layout; or a run folder, for
            its last exported weights. A target encoder starts as a copy. Empty: random weights. The file's sha256
            belongs to the recipe, and not its path. Heads always start from random weights.
        weights_sha256: Digest of that file. It is recorded when a run starts; set it to refuse any other file.
    """

    arch: str = "resnet50"
    stem: str = "imagenet"
    zero_init_residual: bool = False
    backbone_init: str = "torch"
    projector: HeadOptions = field(default_factory=HeadOptions)
    predictor: HeadOptions = field(default_factory=HeadOptions)
    norm: str = "local"
    norm_group_size: int = 0
    norm_momentum: float = 0.1
    norm_running: str = "all_groups"
    shuffle_bn: bool = False
    joint_forward: bool = False
    weights: str = ""
    weights_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class BankOptions:
    """The memory bank of past embeddings, for methods that have one.

    Attributes:
        size: Number of rows.
        init: First content: ``random`` unit vectors (as the official code of MSF, CMSF and MoCo) or ``empty``.
        placement: ``replicated`` (every process holds all rows) or ``sharded`` (each holds its part). Both find the
            same neighbors.
    """

    size: int = 128_000
    init: str = "random"
    placement: str = "replicated"


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """How a run is carried out. None of these keys changes its result, except for the rounding of sums.

    Attributes:
        devices: ``cpu``, ``gpu``, or ``auto`` for a GPU where there is one for each process.
        threads: Threads per process for arithmetic. 0: one on a CPU, torch's default beside a GPU.
        loader_threads: Threads per process that read and decode images.
        decoder: How JPEGs are decoded and cropped: ``auto`` (with the native decoder, if it was built and a trial finds
            it equal to the plain one), ``plain``, or ``native`` (an error where it cannot be used). The pixels are the
            same.
        accumulation_steps: Micro-batches that a step's batch is cut into, to save memory.
        channels_last: Whether weights and images use the channels-last memory layout.
        deterministic: Whether a GPU uses deterministic algorithms only, which are slower.
        kernels: Kernels of the batch norms and augmentations on a GPU: ``auto`` (the fast ones, if a trial before the
            training finds them equal to the plain ones; else the plain ones, with a warning), ``plain``, or ``fast``
            (an error where they cannot be used). On a CPU they are always plain.
        fused: Whose SGD is used: ``torch``, or ``apex`` for the fused one of NVIDIA's apex.
        compile: Whether residual blocks are compiled by ``torch.compile``, which takes minutes at each start. Where a
            trial fails they are not, with a warning.
        checkpoint_steps: Number of steps between two checkpoints. 0: none is saved by the number of steps.
        checkpoint_minutes: Minutes between two checkpoints. 0: none is saved by the clock.
        keep_checkpoints: How many of the newest checkpoints are kept.
        keep_every_steps: Checkpoints of multiples of this step are never deleted. 0: none.
        log_steps: Number of steps over which metrics are averaged before they are written.
        log_sample_ids: Whether the sample numbers of every step are written to the run folder.
        max_nonfinite_steps: After this number of consecutive steps with a loss or gradient that is not finite, the
            run returns to its newest checkpoint and skips the batches since then.
        max_rollbacks: How often a run may return to a checkpoint before it ends with an error.
        replica_check_steps: Number of steps between two comparisons of the state that all processes must hold alike.
            0: only before each checkpoint.
        timeout_minutes: How long processes wait for each other, at the start and in a collective.
        hang_minutes: Minutes without progress of any process after which the attempt ends and names the process and the
            operation that hang. Fractions are allowed. 0: never. It is the limit of each phase (start-up, data, step,
            save, evaluation) until the run has shown what is normal there.
        hang_factor: A known phase may be without progress for this multiple of its longest time so far, but not for
            longer than ``hang_minutes``. 0: ``hang_minutes`` for all phases.
        hang_floor_minutes: The shortest limit that may follow from ``hang_factor``.
        export_epochs: Number of epochs between two exports of the encoder's weights. 0: only at the start and the end.
    """

    devices: str = "auto"
    threads: int = 0
    loader_threads: int = 1
    decoder: str = "auto"
    accumulation_steps: int = 1
    channels_last: bool = True
    deterministic: bool = False
    kernels: str = "auto"
    fused: str = "torch"
    compile: bool = False
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 15.0
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    log_steps: int = 10
    log_sample_ids: bool = False
    max_nonfinite_steps: int = 3
    max_rollbacks: int = 1
    replica_check_steps: int = 100
    timeout_minutes: float = 30.0
    hang_minutes: float = 10.0
    hang_factor: float = 10.0
    hang_floor_minutes: float = 2.0
    export_epochs: int = 0


RENAMES = Renames(
    keys={
        "like": "base",
        "data.stage": "data.stage_dir",
        "data.stage_gb": "data.stage_limit_gb",
        "data.stall_seconds": "data.stall_timeout_seconds",
        "data.tries": "data.download_attempts",
        "data.window": "data.shuffle_window",
        "data.damaged_limit": "data.max_damaged",
        "views.crops.number": "views.crops.count",
        "model.norm_group": "model.norm_group_size",
        "model.shuffle": "model.shuffle_bn",
        "model.joint": "model.joint_forward",
        "method.tau": "method.temperature",
        "method.neighbors.tau": "method.neighbors.temperature",
        "method.every": "method.all_allowed",
        "method.twins": "method.k_constraint",
        "method.clusters": "method.num_clusters",
        "method.iterations": "method.kmeans_iterations",
        "method.pseudo": "method.pseudo_labels",
        "method.pseudo_labels.labeled": "method.pseudo_labels.labeled_fraction",
        "method.pseudo_labels.per_epoch": "method.pseudo_labels.fits_per_epoch",
        "method.rounds": "method.sinkhorn_iterations",
        "method.queue_epoch": "method.queue_start_epoch",
        "bank.start": "bank.init",
        "optim.lr_per": "optim.lr_scaling",
        "optim.trust": "optim.trust_coefficient",
        "optim.lr_place": "optim.lr_in_momentum",
        "schedule.per": "schedule.interval",
        "machine.accumulate": "machine.accumulation_steps",
        "machine.keep": "machine.keep_checkpoints",
        "machine.keep_every": "machine.keep_every_steps",
        "machine.log_samples": "machine.log_sample_ids",
        "machine.nonfinite_limit": "machine.max_nonfinite_steps",
        "machine.rollbacks": "machine.max_rollbacks",
        "machine.check_replicas_steps": "machine.replica_check_steps",
    },
    values={
        "model.norm": {"whole": "sync"},
        "mix.pairing": {"neighbors": "adjacent"},
        "method.rule": {
            "twin": "two_queues",
            "label": "supervised",
            "pseudo": "semi_supervised",
            "modality": "cross_modal",
        },
        "optim.lr_scaling": {"absolute": "none"},
        "optim.lr_in_momentum": {"inside": "true", "outside": "false"},
    },
)
"""Former names of recipe keys and values. They are refused with the new name."""
