"""Start a run from the complete state of another run's checkpoint: train longer, or branch with other values.

The checkpoint is copied into the new run folder (as hard links where the file system allows), beside ``parent.json``,
which says where it comes from. From then on the new run is like any other, and does not need its parent.

What may change is listed in ``MAY_CHANGE``: values that are read at each step. What the state is made of may not.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl import config, files
from hpcssl.checkpoint import reader
from hpcssl.checkpoint.reader import SavedCheckpoint
from hpcssl.errors import ResumeError
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import Fields

MAY_CHANGE = (
    "seed",
    *("data.train", "data.shuffle_window", "views", "mix", "schedule"),
    *(f"optim.{name}" for name in ("batch", "lr", "lr_scaling", "momentum", "nesterov", "weight_decay")),
    *(f"optim.{name}" for name in ("exclude_norm_and_bias", "not_excluded", "trust_coefficient", "trust_denominator")),
    "optim.precision",
    *(f"model.{name}" for name in ("norm_group_size", "norm_momentum", "norm_running", "shuffle_bn", "joint_forward")),
    *(f"method.{name}" for name in ("k", "include_self", "temperature", "ema", "symmetric", "contrast", "reduction")),
    *(f"method.{name}" for name in ("gradient_factor", "fix_predictor_lr", "epsilon", "sinkhorn_iterations")),
    *(f"method.{name}" for name in ("freeze_steps", "queue_start_epoch", "all_allowed", "k_constraint", "legacy_fill")),
    *(f"method.{name}" for name in ("num_clusters", "kmeans_iterations")),
    *(f"method.pseudo_labels.{name}" for name in ("threshold", "fits_per_epoch", "epochs", "batch", "lr")),
    "method.pseudo_labels.weight_decay",
    *(f"method.neighbors.{name}" for name in ("rule", "k", "temperature", "both_views", "replace")),
)
"""Keys and sections that a branch may change. The others decide what the state means, or only what it starts from."""
_FIELDS: Fields = {"path": str, "step": int, "digest": str, "fingerprint": str, "changed": dict}


@dataclass(frozen=True)
class RunBranch:
    """A run that starts from a checkpoint of another one.

    Attributes:
        source: Folder of the other run.
        saved: Its checkpoint.
        changed: By dotted key that differs from the other run: the new value and the old one.
    """

    source: RunDir
    saved: SavedCheckpoint
    changed: dict[str, list[Any]]

    def describe(self) -> str:
        """Return a sentence that says where the run starts and what changes."""
        values = ", ".join(f"{key}={new} (before: {old})" for key, (new, old) in self.changed.items())
        text = f"Starts from step {self.saved.step} of {self.source.root}; changed: {values or 'nothing'}."
        if self.changed.keys() & {"data.train", "optim.batch"}:
            text += " Steps count on from there, and an epoch now has another number of them."
        return text

    def write(self, run: RunDir) -> None:
        """Copy the checkpoint and its origin into the folder of the new run. It can be repeated after a kill.

        Raises:
            ResumeError: The checkpoint is damaged, or the folder has a whole one of another run at the same step.
            OSError: The disk is full, or not writable.
        """
        try:
            why = self.saved.why_invalid()
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            raise ResumeError(
                f"checkpoint {self.saved.folder}",
                got=why,
                expected="a whole checkpoint",
                fix=f"name another step, as in --from {self.source.root}@STEP",
            )
        folder = run.checkpoint(self.saved.step)
        leftover = (read_parent(run) or {}).get("fingerprint")  # of a start that was interrupted
        for _, other in reader.folders(run):
            self._refuse_to_replace(other, leftover)
            files.remove(other)
        record = {"path": str(self.source.root), "step": self.saved.step, "digest": self.saved.digest()}
        record |= {"fingerprint": self.saved.manifest["fingerprint"], "changed": self.changed}
        # first: a checkpoint without it would be that of this run, for another command with the parent's own recipe
        files.write_record(run.parent, record, indent=1)
        with files.atomic_dir(folder) as temporary:
            for name in [*(part["file"] for part in self.saved.manifest["parts"]), reader.MANIFEST]:
                _link_or_copy(self.saved.folder / name, temporary / name)

    def _refuse_to_replace(self, folder: Path, leftover: str | None) -> None:
        """Raise ``ResumeError`` if a folder holds a whole checkpoint that is no copy of a parent's."""
        if not reader.has_expected_sizes(folder):
            return
        fingerprint = SavedCheckpoint.open(folder).manifest.get("fingerprint")
        if fingerprint not in (self.saved.manifest["fingerprint"], leftover):
            raise ResumeError(
                f"checkpoint {folder}",
                got="a checkpoint of another recipe than that of the run that --from names",
                expected=f"no checkpoint, or the one of {self.source.root}",
                fix="name another --run folder",
            )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        with files.atomic_file(target) as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy, 1 << 24)


def read_parent(run: RunDir) -> dict[str, Any] | None:
    """Return ``path``, ``step``, ``digest``, ``fingerprint`` and ``changed`` of the checkpoint a run started from.

    None for a run that started from step 0.
    """
    return files.read_record(run.parent, _FIELDS)


def check_no_interrupted_start(run: RunDir) -> None:
    """Check that a folder without a run does not hold the checkpoint of a ``--from`` that was interrupted.

    Raises:
        ResumeError: It does: a run of another recipe would continue from that checkpoint.
    """
    if run.parent.exists() and not run.config.exists() and (parent := read_parent(run)):
        start = f"--from {parent['path']}@{parent['step']}"
        raise ResumeError(
            f"run folder {run.root}",
            got=f"what a command with {start} has left, which was interrupted",
            expected="no run, or one that has begun",
            fix=f"repeat that command, or remove the folder {run.root}",
        )


def find_checkpoint(text: str, run: RunDir) -> tuple[RunDir, SavedCheckpoint]:
    """Find the checkpoint that ``RUN[@STEP]`` names; without a step the newest one. Its parts are not read.

    Args:
        text: What the user wrote.
        run: The folder of the new run.

    Raises:
        ResumeError: There is no such checkpoint.
    """
    source, step = _parse(text)
    steps = [step for step, folder in reader.folders(source) if reader.has_expected_sizes(folder)]
    if source.root.resolve() == run.root.resolve():
        raise ResumeError(
            f"option --from {text}",
            got="the folder of --run",
            expected="another run",
            fix="leave out --from to continue the run",
        )
    if not source.config.exists() or not steps or (step is not None and step not in steps):
        known = ", ".join(map(str, steps))
        is_run = source.config.exists()
        raise ResumeError(
            f"option --from {text}",
            got=(f"no checkpoint of step {step}" if steps else "no checkpoint") if is_run else "no run in this folder",
            expected=f"one of the steps {known}" if steps else "the folder of a run that has saved",
            fix=f"--from {source.root}@{steps[-1]}" if steps else "check the path",
        )
    return source, SavedCheckpoint.open(source.checkpoint(steps[-1] if step is None else step))


def check_resumed(text: str, run: RunDir) -> None:
    """Check that a run that exists was started from the checkpoint that ``--from`` names.

    Without a step, any checkpoint of that run will do: the parent may have saved others since then.

    Raises:
        ResumeError: It was not.
    """
    check_parent(*_parse(text), run)


def check_parent(source: RunDir, step: int | None, run: RunDir) -> None:
    """``check_resumed`` for a folder and a step; None for any step."""
    parent = read_parent(run)
    if parent is None or Path(parent["path"]).resolve() != source.root.resolve() or step not in (None, parent["step"]):
        raise ResumeError(
            f"run folder {run.root}",
            got=f"a run that was started from {parent['path']}@{parent['step']}" if parent else "a run of its own",
            expected=f"no run, or one that was started with --from {source.root}" + (f"@{step}" if step else ""),
            fix="name another --run folder for the branch; without --from the run continues",
        )


def find_changes(saved: SavedCheckpoint, science: dict[str, Any], last_step: int) -> dict[str, list[Any]]:
    """Compare the values of a branch with those that its checkpoint was saved under.

    Args:
        saved: The checkpoint.
        science: What the result of the new run depends on (``Recipe.science``).
        last_step: The last step of the new run.

    Returns:
        By dotted key that differs: the new and the old value.

    Raises:
        ResumeError: The state would lose its meaning under the new values, or the run would end before it starts.
    """
    before = saved.manifest["science"]
    keys = config.differing(science, before)
    changed = {key: [config.lookup(science, key), config.lookup(before, key)] for key in keys}
    for key, (new, old) in changed.items():
        if why := _explain_refusal(key, new, old, before):
            raise ResumeError(
                f"option --from with {key}",
                got=f"{new} (before: {old})",
                expected=f"the old value, since {why}",
                fix=f"set {key}={old}, or start a new run without --from (model.weights=RUN takes over the encoder)"
                if key != "data.train"
                else "leave data.train out, or start a new run without --from (model.weights=RUN takes the encoder)",
            )
    if last_step <= saved.step:
        raise ResumeError(
            "option --from",
            got=f"a checkpoint of step {saved.step}, and a run of {last_step} steps",
            expected="a run that goes on",
            fix="raise schedule.epochs or schedule.steps, or name an earlier checkpoint with RUN@STEP",
        )
    return changed


def _explain_refusal(key: str, new: Any, old: Any, science: dict[str, Any]) -> str:
    """Say why a key may not change in this way; empty if it may."""
    if not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE):
        return "the saved state is that of this method and network, or does not depend on the key any more"
    method = science["method"]
    per_image = method["name"] == "cmsf" and method["rule"] in ("two_queues", "kmeans", "semi_supervised")
    uses_labels = method.get("rule") == "supervised" or (method.get("neighbors") or {}).get("rule") == "oracle"
    if key == "data.train" and (per_image or uses_labels):
        return "the saved state belongs to the images, or their labels, of the old data set"
    if key == "seed" and method.get("rule") == "semi_supervised":
        return "the seed chooses the images whose labels may be used"
    if key == "optim.momentum" and 0 in (new, old):
        return "there is no momentum to continue with, or nothing to put it"
    if key == "optim.precision" and {new, old} != {"fp32", "bf16"}:
        return "the state is saved in another type, or without a loss scale: only fp32 and bf16 can replace each other"
    if key == "method.neighbors.rule" and "self" in (new, old):
        return "the rule self has no bank"
    return ""


def _parse(text: str) -> tuple[RunDir, int | None]:
    match = re.fullmatch(r"(.+?)(?:@(\d+))?", text, re.S)
    if match is None:
        raise ResumeError("option --from", got="nothing", expected="RUN or RUN@STEP", fix="name a run folder")
    return RunDir(Path(match[1]).expanduser()), None if match[2] is None else int(match[2])
