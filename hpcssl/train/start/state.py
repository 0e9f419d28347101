"""What an attempt starts from: the newest checkpoint, a weights file, or random weights."""

from __future__ import annotations

import logging

from hpcssl import config
from hpcssl.checkpoint.manager import CheckpointManager
from hpcssl.train.start import branch, initial_weights
from hpcssl.train.train_state import TrainState

LOG = logging.getLogger("hpcssl")


def load_state(training: TrainState, checkpoints: CheckpointManager) -> None:
    """Put a new training state to the newest checkpoint of its run, or else to the weights file of its recipe.

    Args:
        training: The state at step 0, with random weights.
        checkpoints: The checkpoints of the run; from here on only those of this recipe count.
    """
    training.world.set_phase("resume")
    checkpoints.recipe_fingerprint = config.fingerprint(training.science)
    parent = branch.read_parent(checkpoints.run) or {}
    training.parent_fingerprint = parent.get("fingerprint")
    saved = checkpoints.latest()
    if saved is None:
        if training.bank is not None:
            training.bank.fill()
        initial_weights.load(training.recipe, training.pair)
        return
    changes = training.load(saved)
    if saved.step == parent.get("step"):  # the rollbacks of the other run do not count towards the limit of this one
        training.rollbacks = []
    LOG.info("Resumed at step %d from %s.", training.step, saved.folder.name)
    if changes:
        LOG.warning("From here on, results may differ in rounding from an uninterrupted run: %s.", ", ".join(changes))
