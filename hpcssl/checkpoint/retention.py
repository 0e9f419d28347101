"""Which files of a run's checkpoints may be deleted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from hpcssl import files
from hpcssl.checkpoint.reader import FOREIGN, MANIFEST, SavedCheckpoint, folders, has_expected_sizes
from hpcssl.run_dir import RunDir


def obsolete_paths(
    run: RunDir, newest: int, *, keep: int, keep_every: int, skipped: Mapping[int, str] = MappingProxyType({})
) -> list[Path]:
    """What to delete after a complete save.

    That is every checkpoint that is cut short or damaged, and every whole one that is neither among the last ``keep``
    nor a multiple of ``keep_every``; temporary files; and files of the newest checkpoint that its manifest does not
    list.

    Args:
        run: The run folder.
        newest: Step of the checkpoint that was just completed.
        keep: Number of last whole checkpoints to keep.
        keep_every: Steps that are multiples of this are kept; 0 for none.
        skipped: Steps whose checkpoints cannot be resumed from, with the reason. Those that are damaged are deleted;
            those of another recipe (``reader.FOREIGN``) are neither counted nor deleted.
    """
    steps = [(step, folder) for step, folder in folders(run) if skipped.get(step) != FOREIGN]
    whole = [step for step, folder in steps if step == newest or (step not in skipped and has_expected_sizes(folder))]
    kept = {*whole[-keep:], *(step for step in whole if keep_every and step % keep_every == 0)}
    paths = [folder for step, folder in steps if step not in kept] + files.temporaries(run.checkpoints)
    folder = run.checkpoint(newest)
    listed = {MANIFEST, *(part["file"] for part in SavedCheckpoint.open(folder).manifest["parts"])}
    return paths + [path for path in folder.iterdir() if path.name not in listed]


def remove_temporaries(run: RunDir) -> None:
    """Remove the temporary files that a killed attempt left in a run, before this attempt writes any."""
    for folder in (run.checkpoints, run.weights, run.weights / "second"):
        for path in files.temporaries(folder):
            files.remove(path)
    # other programs write other files there
    for path in (run.config, run.parent, run.data, run.shards, run.journal, run.samples, run.done):
        for temporary in files.temporaries(run.root, path.name):
            files.remove(temporary)
