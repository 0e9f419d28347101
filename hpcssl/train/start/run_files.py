"""The files of a run folder that say which run it is: ``config.yaml`` and ``data.json``."""

from __future__ import annotations

from hpcssl import config, files
from hpcssl.data.shards import ShardSet
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe as recipes
from hpcssl.train.recipe import Recipe, recipe_mismatch_error


def write_run_files(run: RunDir, recipe: Recipe, shards: ShardSet) -> None:
    """Write the recipe and the digest of its training shards into the run folder, where they differ."""
    if recorded_data_digest(run) is None:
        files.write_record(run.data, {"train": shards.digest})
    text = config.to_yaml(recipe)
    if not run.config.exists() or run.config.read_text() != text:
        files.atomic_write(run.config, text)


def recorded_data_digest(run: RunDir) -> str | None:
    """Return the digest of the shards that the run was started on.

    None before the first attempt, and where ``data.json`` is damaged; checkpoints record the digest, too.
    """
    record = files.read_record(run.data, {"train": str}) or {}
    digest: str | None = record.get("train")
    return digest


def check_same_recipe(run: RunDir, recipe: Recipe, digest: str = "") -> None:
    """Check that a run that exists was started with this recipe, up to what may change between attempts.

    Args:
        run: The run folder; it need not exist.
        recipe: The recipe.
        digest: Digest of its training shards; empty if they are not open: then they count as those of the run.

    Raises:
        ResumeError: It was started with another one; the message names the keys that differ.
    """
    if not run.config.exists():
        return
    recorded = recorded_data_digest(run)
    theirs = recipes.read(run.config).science(recorded or digest, 1)
    ours = recipe.science(digest or recorded or "", 1)
    for science in (theirs, ours):  # the group size depends on the number of processes: see the checkpoint
        del science["model"]["norm_group_size"]
    if ours != theirs:
        raise recipe_mismatch_error(f"run folder {run.root}", ours, theirs)
