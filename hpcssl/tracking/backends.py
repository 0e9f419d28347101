"""The trackers: MLflow, Weights & Biases, and Trackio. Each is imported where it is used."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpcssl import config
from hpcssl.errors import ConfigError
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import sha256_of
from hpcssl.tracking.pending import StepValues
from hpcssl.tracking.sender import Tracker


def open_tracker(name: str, run: RunDir, recipe: dict[str, Any], *, project: str, where: str) -> Tracker:
    """Open the run in a tracker, or create it there.

    Args:
        name: A key of ``TRACKERS``.
        run: The run folder.
        recipe: Its recipe, which the tracker shows as the run's parameters.
        project: Project or experiment.
        where: Address of the tracker; empty for the tracker's own default.

    Raises:
        ConfigError: There is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise ConfigError("--to", got=repr(name), expected=", ".join(TRACKERS), fix="name one of them")
    return TRACKERS[name](run, recipe, project, where)


def name_in_tracker(run: RunDir) -> str:
    """The run's name in a tracker, which no other folder has: that of the folder, and eight digits of its path."""
    return f"{run.root.name}-{sha256_of({'path': str(run.root.resolve())})[:8]}"


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--to {module}",
            got=f"no package {module} ({error})",
            expected="an environment with it",
            fix=f"pip install 'hpcssl[track-{module}]'",
        ) from error


class MLflowTracker:
    """A run in MLflow. The address is a tracking URI such as ``sqlite:///runs/mlflow.db``.

    MLflow ignores a value that it has: same run, name, step, time and number. The time of a value is that of its step
    here, so that a batch that is sent again changes nothing.
    """

    def __init__(self, run: RunDir, recipe: dict[str, Any], project: str, where: str):
        self._mlflow = _import("mlflow")
        self._client = self._mlflow.MlflowClient(where or None)
        name = name_in_tracker(run)
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self.destination = f"mlflow {where or 'default'} {project} {name}"
        runs = self._client.search_runs([experiment_id], f"tags.hpcssl_name = '{name}'", max_results=1)
        tags = {"hpcssl_name": name}
        stored = runs[0] if runs else self._client.create_run(experiment_id, tags=tags, run_name=run.root.name)
        self._id = stored.info.run_id
        # also for a run that exists: the process that created it may have ended before this
        values = config.flatten(recipe)
        parameters = [self._mlflow.entities.Param(key, str(value)[:500]) for key, value in values.items() if key]
        for k in range(0, len(parameters), 100):
            self._client.log_batch(self._id, params=parameters[k : k + 100])

    def recover(self, first: int, last: int) -> int:
        """Send the whole batch again: what MLflow has of it changes nothing."""
        del last
        return first - 1

    def send(self, steps: Sequence[StepValues]) -> None:
        """Send a batch in requests of at most 1,000 values, which MLflow stores before it answers."""
        metric = self._mlflow.entities.Metric
        values = [metric(name, value, s.step, s.step) for s in steps for name, value in s.values.items()]
        for k in range(0, len(values), 1000):
            self._client.log_batch(self._id, metrics=values[k : k + 1000])


class WandbTracker:
    """A run in Weights & Biases. The address is ``offline``, or that of a server.

    Each batch is a session of its own, with its files in a folder of its own, and is stored when the session has
    finished. Offline, an interrupted session is deleted and sent again. Online, W&B drops steps that a run has.
    """

    def __init__(self, run: RunDir, recipe: dict[str, Any], project: str, where: str):
        self._wandb = _import("wandb")
        self._run, self._recipe, self._project, self._where = run, recipe, project, where
        self._id = name_in_tracker(run)
        self._folder = run.tracking("wandb").with_suffix("")
        self.destination = f"wandb {where or 'default'} {project} {self._id}"

    def _session_folder(self, last: int) -> Path:
        return self._folder / f"until-{last:08d}"

    def recover(self, first: int, last: int) -> int:
        """Delete the files of the interrupted session, and send its batch again."""
        if (folder := self._session_folder(last)).exists():
            shutil.rmtree(folder)  # an error is raised: files that stay would be sent as well
        return first - 1

    def send(self, steps: Sequence[StepValues]) -> None:
        """Send a batch in one session."""
        folder = self._session_folder(steps[-1].step)
        folder.mkdir(parents=True, exist_ok=True)
        is_offline = self._where == "offline"
        settings: dict[str, Any] = {"silent": True, "console": "off", "x_disable_stats": True}
        if self._where and not is_offline:
            settings["base_url"] = self._where
        session = self._wandb.init(
            project=self._project,
            id=self._id,
            name=self._run.root.name,
            dir=str(folder),
            mode="offline" if is_offline else None,
            resume=None if is_offline else "allow",
            config=self._recipe,
            settings=self._wandb.Settings(**settings),
        )
        for step in steps:
            session.log(step.values, step=step.step)
        session.finish()


class TrackioTracker:
    """A run in a local store of Trackio. The address is the folder of the store, on a disk of this machine.

    A batch goes to the storage class that ``trackio.log`` ends at, and is stored when the call returns: ``trackio.log``
    itself hands steps to a thread that does not say so. Each step has an id of its own, and Trackio ignores an id that
    it has.
    """

    def __init__(self, run: RunDir, recipe: dict[str, Any], project: str, where: str):
        if "://" in where:
            raise ConfigError(
                "--where",
                got=where,
                expected="the folder of a local store, since a server of Trackio does not say when steps are stored",
                fix="name a folder, and look at it with `trackio show`",
            )
        if where:
            os.environ["TRACKIO_DIR"] = str(Path(where).absolute())  # read when Trackio is imported
        _import("trackio")
        self._storage = _import("trackio.sqlite_storage").SQLiteStorage
        self._project, self._name, self._id = project, run.root.name, name_in_tracker(run)
        self._config = {key: str(value) for key, value in config.flatten(recipe).items()}
        self.destination = f"trackio {where or 'default'} {project} {self._id}"

    def recover(self, first: int, last: int) -> int:
        """Send the whole batch again: what Trackio has of it changes nothing."""
        del last
        return first - 1

    def send(self, steps: Sequence[StepValues]) -> None:
        """Store a batch in one transaction."""
        self._storage.bulk_log(
            self._project,
            self._name,
            [step.values for step in steps],
            steps=[step.step for step in steps],
            config=self._config,
            log_ids=[f"{self._id}-{step.step}" for step in steps],
            run_id=self._id,
        )


TRACKERS: dict[str, Callable[[RunDir, dict[str, Any], str, str], Tracker]] = {
    "mlflow": MLflowTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}
"""The trackers by name."""
