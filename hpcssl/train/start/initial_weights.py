"""Start from the encoder of a weights file (``model.weights``).

The sha256 of the file is part of the recipe's fingerprint, and its path is not. The file is read by attempts that find
no checkpoint in the run folder; once there is one, it is not needed any more.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from hpcssl import files
from hpcssl.distributed.launch import count_processes
from hpcssl.errors import ConfigError, EvalError
from hpcssl.nets import importers, resnet, weights
from hpcssl.nets.pair import EncoderPair
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe as recipes
from hpcssl.train.recipe import Recipe

LOG = logging.getLogger("hpcssl")


def resolve(recipe: Recipe, run: RunDir) -> Recipe:
    """Return the recipe with the path and the sha256 of the weights file that it starts from.

    Args:
        recipe: The recipe. ``model.weights`` may be a run folder, which stands for the weights at its end. Those of an
            unfinished run, the newest ones, can be named in this way by a single process: of several, each looks them
            up by itself, and could see others.
        run: The run that starts; it need not exist. If it does, a folder stands for the file that its first attempt
            recorded, and a file that is missing is not needed once the run has a checkpoint.

    Raises:
        ConfigError: There is no such file, or it is not the one that ``model.weights_sha256`` names; or several
            processes name an unfinished run.
    """
    path, wanted = recipe.model.weights, recipe.model.weights_sha256
    if not path:
        if wanted:
            raise ConfigError(
                "model.weights_sha256",
                got=f"{wanted[:12]}… without model.weights",
                expected="the weights file that it is the digest of",
                fix="set model.weights=FILE, or remove model.weights_sha256",
            )
        return recipe
    before = recipes.read(run.config).model if run.config.exists() else None
    before = before if before is not None and before.weights else None
    file = Path(path).absolute()
    if file.is_dir():
        is_recorded = before is not None and Path(before.weights).parent.resolve() == RunDir(file).weights.resolve()
        file = Path(before.weights) if before is not None and is_recorded else _last_export(RunDir(file))
    if file.is_file():
        digest = files.sha256_of_file(file)
    elif before is not None and before.weights_sha256 in (wanted or before.weights_sha256,) and _needs_no_file(run):
        file, digest = Path(before.weights), before.weights_sha256
    else:
        fix = "check the path"
        if before is not None:
            fix += ": the run has no checkpoint yet, so that it needs the file once more"
        raise ConfigError("model.weights", got=f"{path}, which does not exist", expected="a file, or a run", fix=fix)
    if wanted and digest != wanted:
        raise ConfigError(
            "model.weights",
            got=f"{file} with sha256 {digest}",
            expected=f"the file of model.weights_sha256={wanted}",
            fix="name that file, or remove model.weights_sha256",
        )
    return replace(recipe, model=replace(recipe.model, weights=str(file), weights_sha256=digest))


def check(recipe: Recipe) -> None:
    """Check that the file of a resolved recipe holds a backbone of the recipe's architecture. It is read completely.

    Raises:
        ConfigError: It does not, or cannot be read.
    """
    if recipe.model.weights and Path(recipe.model.weights).is_file():
        _read(recipe)


def load(recipe: Recipe, pair: EncoderPair) -> None:
    """Copy the backbone of the file into the online encoder, and into the target encoder where there is one.

    Does nothing for a recipe without ``model.weights``.

    Heads keep their random weights. With a second modality, the file is that of the images.

    Args:
        recipe: The resolved recipe.
        pair: The encoders of a run at step 0.

    Raises:
        ConfigError: The file is missing, was changed, or does not fit.
    """
    if not recipe.model.weights:
        return
    path, wanted = Path(recipe.model.weights), recipe.model.weights_sha256
    if not path.is_file() or (wanted and files.sha256_of_file(path) != wanted):
        raise ConfigError(
            "model.weights",
            got=f"{path}, which " + ("was changed" if path.is_file() else "does not exist"),
            expected=f"the file with sha256 {wanted}, since the run has no checkpoint yet",
            fix="put the file back, or start a new run",
        )
    tensors = _read(recipe)
    for encoder in (pair.online, pair.target):
        if encoder is not None:
            own = weights.backbone_tensors(encoder.backbone)
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(tensors[name])


def _read(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of the backbone in the file, by torchvision's names."""
    path, arch = recipe.model.weights, recipe.arch
    try:
        backbone, meta = importers.load(path)
    except EvalError as error:
        raise ConfigError(
            f"model.weights, {error.what}",
            got=error.got,
            expected=error.expected,
            fix="name a file of such an encoder; if its layout has to be named, convert it first: "
            "`hpcssl export --weights FILE --from LAYOUT --to NEW.safetensors`",
        ) from error
    theirs = meta["arch"]
    if (theirs.arch, theirs.stem) != (arch.arch, arch.stem):
        can_be_set = theirs.stem in resnet.STEMS
        raise ConfigError(
            "model.weights",
            got=f"{path}, a {theirs.arch} with the stem {theirs.stem}",
            expected=f"the network of the recipe, model.arch={arch.arch} model.stem={arch.stem}",
            fix=f"set model.arch={theirs.arch} model.stem={theirs.stem}"
            if can_be_set
            else "name the file of another encoder: this stem can be evaluated, but not trained",
        )
    views = recipe.views
    if any(abs(a - b) > 1e-3 for a, b in zip((*views.mean, *views.std), (*meta["mean"], *meta["std"]), strict=True)):
        LOG.warning(
            "%s was trained with mean %s and std %s; this recipe normalizes with other values.",
            path,
            meta["mean"],
            meta["std"],
        )
    return weights.backbone_tensors(backbone)


def _last_export(run: RunDir) -> Path:
    """The last weights of a finished run, or the newest ones of another run."""
    exported = sorted(run.weights.glob("step-*.safetensors"))
    if run.finished and (last := run.weights_at(run.finished["step"])) in exported:
        return last
    if exported and count_processes() != 1:
        raise ConfigError(
            "model.weights",
            got=f"{run.root}, a run that is not finished",
            expected="a finished run, or a file: processes that start now could see different newest weights",
            fix=f"set model.weights={exported[-1]}",
        )
    if not exported:
        raise ConfigError(
            "model.weights",
            got=f"{run.root}, a folder without weights/step-*.safetensors",
            expected="a weights file, or a run that has exported weights",
            fix="name a run that was started, or a file",
        )
    return exported[-1]


def _needs_no_file(run: RunDir) -> bool:
    return bool(run.finished) or (run.checkpoints.is_dir() and any(run.checkpoints.glob("step-*/manifest.json")))
