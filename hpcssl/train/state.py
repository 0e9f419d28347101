"""Everything a step touches, built from a recipe, and its passage to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from hpcssl import config, rng
from hpcssl.data.loader import Batch
from hpcssl.errors import ConfigError, ResumeError
from hpcssl.memory.bank import Bank, ColumnSpec
from hpcssl.memory.rows import Memory
from hpcssl.methods import METHODS
from hpcssl.methods.base import Context, Method, Remembering, Scene
from hpcssl.nets import heads, norm, resnet
from hpcssl.nets.pair import Branch, Pair
from hpcssl.optim import build, schedule
from hpcssl.train import worlds
from hpcssl.train.checkpoint import Rows, Saved, State
from hpcssl.train.recipe import Recipe
from hpcssl.views import mix
from hpcssl.views.augment import ViewSpec, apply
from hpcssl.views.ops import sent
from hpcssl.views.plan import View, ViewPlan, multi_crop
from hpcssl.world import World

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PREDICTORS = ("predictor.", "second.predictor.")


def method_of(recipe: Recipe) -> Method:
    """The recipe's method with its views. No network is built."""
    _, made = METHODS[recipe.method.name]
    return made(recipe.method, recipe.views)


def plan_of(recipe: Recipe, method: Method) -> ViewPlan:
    """The method's plan with the recipe's small crops and mixtures."""
    return mix.rewrite(multi_crop(method.plan, recipe.views), recipe.mix)


class Training:
    """The networks, the optimiser, the bank and the method of one run, at ``step`` finished steps.

    ``steps_per_epoch`` and the recipe give the run's length ``last_step``. ``labels`` int64 [images] of the data set,
    -1 for none: diagnostics may watch them, and methods with labels learn. ``memories``: what the method keeps
    beside the bank. ``support(step)``: the random images that a bank filled ``anew`` is made of (``train/support.py``).
    """

    support: Callable[[int], Iterable[Batch]] | None = None

    def __init__(self, recipe: Recipe, world: World, *, steps_per_epoch: int, labels: np.ndarray, data_digest: str):
        self.recipe, self.world, self.labelled = recipe, world, bool((labels >= 0).any())
        self.science = recipe.science(data_digest, world.size)
        self.method = method_of(recipe)
        self.plan = plan_of(recipe, self.method)
        self._check_cuts()
        world.deal(recipe.optim.batch, recipe.machine.accumulate)
        self.steps_per_epoch, self.step = steps_per_epoch, 0
        self.last_step = schedule.total_steps(recipe.schedule, steps_per_epoch)
        self.dtype = torch.float64 if recipe.optim.precision == "fp64" else torch.float32
        self.pair = self._pair()
        self.norms = norm.norms_of(n for n in (self.pair.online, self.pair.target) if n is not None)
        for layer in self.norms:
            layer.micro_batches = recipe.machine.accumulate
        self.optimizer = build.build(recipe.optim, self.pair.online.named_parameters(),
                                     global_batch=recipe.optim.batch,
                                     constant_lr=_PREDICTORS if self.method.heads.constant_lr else ())
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.optim.precision == "fp16")
        self.bank = self._bank()
        self.memories: dict[str, Memory] = {}
        if isinstance(self.method, Remembering):
            self.memories = self.method.memories(Scene(labels, recipe.seed, recipe.model.projector.out, self.dtype,
                                                       recipe.bank.placement, world))
        self.skipped_in_a_row = 0
        self.rolled_back: list[tuple[int, int]] = []  # (step of the checkpoint, step that the run went on from)

    def _check_cuts(self) -> None:
        """Refuse a batch that cannot be cut into these micro-batches and ranks."""
        recipe, accumulate = self.recipe, self.recipe.machine.accumulate
        sent_away = recipe.mix.kind != "none" and recipe.mix.pairing != "neighbours"
        if accumulate > 1 and (self.method.in_batch or sent_away):
            raise ConfigError("machine.accumulate",
                              got=f"{accumulate} with " + (f"mix.pairing={recipe.mix.pairing}" if sent_away
                                                           else f"method {recipe.method.name}"),
                              expected="1, since the rows of its batch enter each other's loss",
                              mend="set machine.accumulate=1 and use more processes")
        worlds.check(recipe, self.world.size)

    def _pair(self) -> Pair:
        recipe, world, options = self.recipe, self.world, self.recipe.model
        group = self.science["model"]["norm_group"]

        def layer(channels: int, affine: bool = True) -> nn.Module:
            return norm.BatchNorm(channels, group=group, world=world, momentum=options.norm_momentum, affine=affine)

        def branch(prefix: str, second: Branch | None) -> Branch:
            backbone = resnet.build(recipe.arch, layer)
            projector = heads.build(resnet.width_of(backbone), options.projector, layer)
            predictor = {"none": lambda: None,
                         "mlp": lambda: heads.build(options.projector.out, options.predictor, layer),
                         "prototypes": lambda: heads.Prototypes(options.projector.out, self.method.heads.prototypes),
                         }[self.method.heads.predictor]()
            for place, network in (("backbone", backbone), ("projector", projector), ("predictor", predictor)):
                if network is not None:
                    resnet.initialise(network, recipe.seed, prefix + place)
            return Branch(backbone, projector, predictor, second, options.joint)

        two = any(view.second for view in self.plan.views)
        self._check_model(two)
        online = branch("", branch("second.", None) if two else None).to(world.device, self.dtype)
        if recipe.machine.channels_last:
            online = online.to(memory_format=torch.channels_last)
        return Pair(online, self.method.target, world, _CASTS.get(recipe.optim.precision)).train()

    def _check_model(self, two: bool) -> None:
        """Refuse options that this method could not follow. ``two``: it has views of two modalities."""
        recipe = self.recipe
        if two and recipe.model.joint:
            raise ConfigError("model.joint", got="true with views of two modalities", expected="views of one, which "
                              "pass one network", mend="set model.joint=false")
        if recipe.model.shuffle and self.method.target != "ema":
            raise ConfigError("model.shuffle", got=f"true with method {recipe.method.name}", expected="a method whose "
                              "targets come from a moving average, whose images can be shuffled by themselves",
                              mend="set model.shuffle=false")
        if not two and (recipe.views.second_query or recipe.views.second_target):
            raise ConfigError("views.second_query, views.second_target", got=f"one of them with method "
                              f"{recipe.method.name}", expected="a method with views of two modalities",
                              mend="leave both, or take method.name=cmsf method.rule=modality")

    def _bank(self) -> Bank | None:
        if self.method.bank is None:
            return None
        if self.recipe.bank.size < self.recipe.optim.batch:
            raise ConfigError("bank.size", got=self.recipe.bank.size, expected=f"at least the batch, "
                              f"{self.recipe.optim.batch}", mend=f"set bank.size={self.recipe.optim.batch} or more")
        options = self.recipe.bank
        batch = self.recipe.optim.batch
        if self.method.bank.push == "anew" and options.size % batch:
            raise ConfigError("bank.size", got=options.size, expected=f"a multiple of the batch of {batch}, since it "
                              "is filled anew for every step, in batches",
                              mend=f"set bank.size={-(-options.size // batch) * batch}")
        columns = {"key": ColumnSpec(self.recipe.model.projector.out), "index": ColumnSpec(), "label": ColumnSpec()}
        columns |= dict.fromkeys(self.method.bank.vectors, columns["key"])
        columns |= dict.fromkeys(self.method.bank.numbers, ColumnSpec())
        # a GPU certifies neighbours only where bits are asked for: it has to wait for the host
        return Bank(options.size, columns, self.world, placement=options.placement, start=options.start,
                    key=rng.key(self.recipe.seed, "bank"), dtype=self.dtype,
                    exact=True if self.recipe.machine.deterministic else None)

    # -- what a step asks for -------------------------------------------------------------------------------

    def set_rates(self) -> tuple[float, float]:
        """Set the optimiser's rate for the next update; returns that rate and the target's momentum."""
        optim, step = self.recipe.optim, self.step
        lr = schedule.learning_rate(self.recipe.schedule, step, peak=optim.lr, steps_per_epoch=self.steps_per_epoch)
        build.set_lr(self.optimizer, optim, lr, global_batch=optim.batch)
        momentum = 0.0
        if self.method.target == "ema":
            momentum = schedule.target_momentum(self.recipe.method.ema, step, total=self.last_step)
        return lr * build.batch_factor(optim, optim.batch), momentum

    @property
    def view_specs(self) -> list[ViewSpec]:
        """The views that the loader cuts, in the plan's order."""
        return [_spec(number, view) for number, view in enumerate(self.plan.views)]

    @property
    def support_specs(self) -> list[ViewSpec]:
        """How the images of a bank that is filled ``anew`` are cut: as the view that the method keeps; [] without."""
        if self.method.bank is None or self.method.bank.push != "anew":
            return []
        return [_spec(view, self.plan.views[view]) for view in self.method.bank.views]

    def second(self, views: Iterable[int]) -> list[bool]:
        """Which of these views of the plan, mixed ones included, are of the second modality."""
        count = len(self.plan.views)
        return [self.plan.views[v if v < count else self.plan.mixed[v - count]].second for v in views]

    def images(self, batch: Batch, numbers: Iterable[int] | None = None) -> list[Tensor]:
        """The batch's views on the device, augmented and normalised, [b, 3, S, S] each: all of the plan's, or those of
        these ``numbers`` in it."""
        views = self.recipe.views
        plan = [self.plan.views[number] for number in (range(len(self.plan.views)) if numbers is None else numbers)]
        return [apply(image.to(self.world.device, non_blocking=True), params, view.augmentation,
                      mean=views.mean, std=views.std, dtype=self.dtype)
                for image, params, view in zip(batch.images, batch.params, plan, strict=True)]

    def context(self, batch: Batch) -> Context:
        device = self.world.device
        return Context(step=batch.step, epoch_steps=self.steps_per_epoch, seed=self.recipe.seed, world=self.world,
                       bank=self.bank, memories=self.memories, watch_labels=self.labelled,
                       index_B=sent(batch.index, device), label_B=sent(batch.label, device),
                       pos_B=torch.arange(len(batch.index), device=device), predict=self.pair.predict)

    def shuffles(self, step: int) -> list[Tensor] | None:
        """A permutation of the global batch for each target view (shuffle-BN), or None where it is not asked for."""
        if not self.recipe.model.shuffle:
            return None
        keys = [rng.key(self.recipe.seed, "shuffle", step, view) for view in self.plan.targets]
        return [sent(rng.permutation(key, self.recipe.optim.batch), self.world.device) for key in keys]

    # -- to and from a checkpoint ---------------------------------------------------------------------------

    def state(self) -> State:
        """The whole state at this step. Its tensors are the living ones: the store copies them."""
        tensors = {f"pair.{name}": Rows(t) for name, t in self.pair.state_dict().items()}
        tensors |= {f"optim.{name}": Rows(t) for name, t in build.tensors(self.optimizer).items()}
        numbers = {"skipped_in_a_row": self.skipped_in_a_row, "rolled_back": self.rolled_back}
        if self.scaler.is_enabled():
            numbers["scaler"] = self.scaler.state_dict()
        for memory, kept in self._kept():
            parts, numbers[memory] = kept.state()
            tensors |= {f"{memory}.{name}": Rows(*part) for name, part in parts.items()}
        return State(self.step, tensors, numbers, config.fingerprint(self.science), self.science, self._machinery())

    def replicas(self) -> dict[str, Tensor]:
        """What all ranks hold with equal bits, by name: networks, optimiser, and what is remembered and not split."""
        held = {name: rows.local for name, rows in self.state().tensors.items() if rows.total is None}
        return held | {f"{memory}.{name}": rows for memory, kept in self._kept()
                       for name, rows in kept.replicas().items()}

    def _kept(self) -> list[tuple[str, Memory]]:
        return ([("bank", self.bank)] if self.bank is not None else []) + sorted(self.memories.items())

    def _machinery(self) -> dict:
        machine, gpu = self.recipe.machine, self.world.device.type == "cuda"
        return {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
                "torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu",
                "cuda": torch.version.cuda if gpu else None, "cudnn": torch.backends.cudnn.version() if gpu else None,
                "world": self.world.size, "deterministic": machine.deterministic if gpu else None,
                "channels_last": machine.channels_last, "accumulate": machine.accumulate}

    def load(self, saved: Saved) -> list[str]:
        """Become what was saved. Returns what may change the bits from here on (another torch, thread count, world).

        Raises ``ResumeError`` if the checkpoint is of another recipe.
        """
        if saved.manifest["fingerprint"] != config.fingerprint(self.science):
            raise another_recipe(f"checkpoint {saved.folder}", self.science, saved.manifest["science"])
        own = self.pair.state_dict()
        self._check_names({f"pair.{name}" for name in own}, {n for n in saved.names if n.startswith("pair.")}, saved)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved.rows(f"pair.{name}"))
        build.restore(self.optimizer, {name.removeprefix("optim."): saved.rows(name)
                                       for name in saved.names if name.startswith("optim.")})
        numbers = saved.manifest["numbers"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(numbers["scaler"])
        for memory, kept in self._kept():
            kept.load(numbers[memory],
                      lambda name, start, stop, of=memory: saved.rows(f"{of}.{name}", start, stop - start))
        self.skipped_in_a_row, self.step = numbers["skipped_in_a_row"], saved.step
        self.rolled_back = [tuple(steps) for steps in numbers.get("rolled_back", [])]
        was, now = saved.manifest["machinery"], self._machinery()
        return [f"{key} {was.get(key)} → {now[key]}" for key in now if was.get(key) != now[key]]

    def roll_back(self, saved: Saved) -> None:
        """Take everything but the place in the data from a checkpoint: the batches since then are passed by."""
        step, before = self.step, self.rolled_back
        self.load(saved)
        self.step, self.rolled_back, self.skipped_in_a_row = step, [*before, (saved.step, step)], 0

    def _check_names(self, ours: set[str], theirs: set[str], saved: Saved) -> None:
        if ours != theirs:
            raise ResumeError(f"checkpoint {saved.folder}", got=f"missing {sorted(ours - theirs)[:3]}, unknown "
                              f"{sorted(theirs - ours)[:3]}", expected="the tensors of this recipe's networks",
                              mend="resume with the version of hpcssl that wrote it (RUN/code)")


def another_recipe(what: str, ours: dict, theirs: dict) -> ResumeError:
    """The error for a run that was started with other science; it names each field with both values."""
    fields = config.differing(ours, theirs)
    values = ", ".join(f"{name}={_leaf(ours, name)} (was {_leaf(theirs, name)})" for name in fields)
    mend = "give the old values, or start a new run with another --run folder"
    if fields == ["model.norm_group"]:
        was = theirs["model"]["norm_group"]
        mend = f"set model.norm=ghost model.norm_group={was}, which means the same groups on this number of processes"
    return ResumeError(what, got=f"a recipe that differs in {values}",
                       expected="the recipe that the run was started with", mend=mend)


def _spec(number: int, view: View) -> ViewSpec:
    return ViewSpec(name=f"{number}-{view.augment}", augment=view.augmentation, size=view.size, second=view.second)


def _leaf(values: dict, name: str) -> object:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
