"""Random images for a support set that is embedded again at every step (NNCLR, Table 8)."""

from __future__ import annotations

from collections.abc import Iterator

from hpcssl import rng
from hpcssl.data.batch import Batch
from hpcssl.data.loader import Loader
from hpcssl.data.order import SupportOrder
from hpcssl.data.reader import Reader
from hpcssl.distributed.world import World
from hpcssl.optim import schedule
from hpcssl.train import world_sizes
from hpcssl.train.builders import build_method, build_view_plan, check_bank_size, support_view_specs
from hpcssl.train.recipe import Recipe


class SupportLoader:
    """Loads several batches of random images per training step.

    Steps that follow each other are read ahead; any other step can be asked for as well.

    Args:
        loader: A loader over ``SupportOrder``, whose steps are the batches.
        per_step: Batches per training step.
        last_step: Number of training steps of the run.
    """

    def __init__(self, loader: Loader, per_step: int, last_step: int):
        self.loader, self.per_step, self.end = loader, per_step, last_step * per_step
        self._next = -1
        self._batches: Iterator[Batch] = iter(())

    def batches(self, step: int) -> Iterator[Batch]:
        """Yield the ``per_step`` batches of a training step. Each is valid until the next one is requested."""
        first = step * self.per_step
        if self._next != first:
            self._batches = iter(self.loader.iterate(first, self.end))
        self._next = first + self.per_step
        for _ in range(self.per_step):
            yield next(self._batches)

    def close(self) -> None:
        """Stop the loader's threads."""
        self.loader.close()


def build_support_loader(
    recipe: Recipe, world: World, reader: Reader, *, steps_per_epoch: int, threads: int = 1, pin: bool = False
) -> SupportLoader | None:
    """Build the loader of the support set, or return None for methods whose bank is not refilled at every step.

    Args:
        recipe: The recipe; ``bank.size`` images are drawn per step, in batches of ``optim.batch``.
        world: The processes.
        reader: Reader of the training images.
        steps_per_epoch: Training steps per epoch.
        threads: Threads of this process that read and decode.
        pin: Whether batches lie in pinned memory.

    Raises:
        ConfigError: The data set is too small, or ``bank.size`` is not a multiple of the batch.
        WorldError: The recipe cannot run on this number of processes.
    """
    method = build_method(recipe)
    specs = support_view_specs(method, build_view_plan(recipe, method))
    if not specs or method.bank is None:
        return None
    world_sizes.check(recipe, world.size, needs_whole_batch=method.needs_whole_batch)
    check_bank_size(recipe, method.bank)
    batch = recipe.optim.batch
    per_step = recipe.bank.size // batch
    order = SupportOrder(
        len(reader),
        seed=recipe.seed,
        global_batch=batch,
        per_step=per_step,
        micro_batches=recipe.machine.accumulation_steps,
    )
    loader = Loader(
        reader,
        order,
        specs,
        seed=rng.key(recipe.seed, "support"),
        rank=world.rank,
        size=world.size,
        threads=threads,
        pin=pin,
        decoder=recipe.machine.decoder,
    )
    epoch_length = schedule.epoch_length(recipe.schedule, steps_per_epoch, images=len(reader), batch=batch)
    last_step = schedule.total_steps(recipe.schedule, epoch_length)
    return SupportLoader(loader, per_step, last_step)
