"""Write any known encoder as a file of this project, of torchvision, of timm or of Detectron2."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError, suggest
from hpcssl.nets import importers, resnet, tensor_file, weights
from hpcssl.nets.importers import WeightsSource
from hpcssl.nets.key_maps import to_detectron2
from hpcssl.nets.resnet import Arch

LAYOUTS = ("hpcssl", "torchvision", "timm", "detectron2")
"""The layouts that ``export`` writes."""


def export(source: WeightsSource | Path | str, target: Path | str, layout: str = "hpcssl") -> str:
    """Write the encoder of a file in another layout.

    * ``hpcssl``: this project's own. A file of this project is copied byte for byte unless the source changes it.
    * ``torchvision``: torchvision's key names without ``fc``; a safetensors file, or for a target that ends in .pth or
      .pt, a state dict for ``torch.load``.
    * ``timm``: the same two, for ``timm.create_model(NAME, num_classes=0, checkpoint_path=FILE)``. A target without a
      suffix becomes a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, which also holds the
      normalization.
    * ``detectron2``: a .pth file for MODEL.WEIGHTS.

    Args:
        source: Any file that ``importers.load`` reads.
        target: The file or folder to write.
        layout: One of ``LAYOUTS``.

    Returns:
        The sha256 of ``target``, or of the weights in it where it is a folder.

    Raises:
        ConfigError: If the layout is unknown.
        EvalError: If the source cannot be read, the target exists as a folder or has a suffix that the layout's reader
            would misread, or the layout cannot hold the architecture.
    """
    if layout not in LAYOUTS:
        raise ConfigError("--layout", got=repr(layout), expected="a known layout", fix=suggest(layout, LAYOUTS))
    source, target = WeightsSource.coerce(source), Path(target)
    if target.is_dir():
        raise EvalError(
            f"layout {layout}, target {target}",
            got="an existing folder",
            expected="a path to write",
            fix="name another one, such as FOLDER/encoder.safetensors",
        )
    backbone, meta = importers.load(source)
    if layout == "hpcssl":
        if source.uses_defaults and meta["format"] == weights.FORMAT:
            files.atomic_write(target, Path(source.path).read_bytes())
            return files.sha256_of_file(target)
        return weights.save(target, backbone, **{name: value for name, value in meta.items() if name != "format"})
    check_architecture(layout, meta["arch"])
    if layout == "detectron2":
        return _write_detectron2(target, backbone, meta)
    tensors = {name: value.contiguous() for name, value in weights.backbone_tensors(backbone).items()}
    if layout == "timm" and not target.suffix:
        return _write_timm_folder(target, tensors, meta, resnet.feature_width(backbone))
    return _write_state_dict(target, tensors)


def check_architecture(
    layout: str, arch: Arch, fix: str = "use --layout hpcssl, which `hpcssl.load_backbone` reads"
) -> None:
    """Raise ``EvalError`` unless torchvision, and so timm and Detectron2, has the network. ``fix``: what to do."""
    if arch.stem != "imagenet" or arch.arch not in resnet.RESNETS:
        raise EvalError(
            f"layout {layout}",
            got=f"{arch.arch} with the {arch.stem} stem",
            expected="a ResNet that torchvision itself builds",
            fix=fix,
        )


def check_new_folder(layout: str, target: Path) -> None:
    """Raise ``EvalError`` if a folder to write exists."""
    if target.exists():
        raise EvalError(
            f"layout {layout}, target {target}",
            got="an existing folder" if target.is_dir() else "an existing file",
            expected="a folder to make",
            fix="name another one",
        )


def _write_state_dict(target: Path, tensors: dict[str, Tensor]) -> str:
    if target.suffix in (".pth", ".pt"):
        _torch_save(target, tensors)
    else:
        files.atomic_write(target, tensor_file.pack(tensors, {"format": "pt"}, checksum=False))
    return files.sha256_of_file(target)


def _torch_save(target: Path, content: dict[str, Any]) -> None:
    body = io.BytesIO()
    torch.save(content, body)
    files.atomic_write(target, body.getvalue())


def _write_timm_folder(target: Path, tensors: dict[str, Tensor], meta: dict[str, Any], width: int) -> str:
    """Write ``config.json`` and ``model.safetensors`` as timm 1.0 does.

    See timm/models/_hub.py: save_config_for_hf, load_model_config_from_path.
    """
    check_new_folder("timm", target)
    config = build_timm_config(meta, width)
    with files.atomic_dir(target) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(tensor_file.pack(tensors, {"format": "pt"}, checksum=False))
    return files.sha256_of_file(target / "model.safetensors")


def build_timm_config(meta: dict[str, Any], width: int) -> dict[str, Any]:
    """Build the content of a ``config.json`` as timm 1.0 writes it.

    Args:
        meta: Header of the weights file.
        width: Number of features.
    """
    size = meta["size"]
    return {
        "architecture": meta["arch"].arch,
        "num_classes": 0,
        "num_features": width,
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": meta["mean"],
            "std": meta["std"],
            "crop_pct": crop_fraction(size),
            "crop_mode": "center",
            "interpolation": "bilinear",
            "fixed_input_size": False,
            "pool_size": None,
            "num_classes": 0,
            "first_conv": "conv1",
            "classifier": "fc",
            "custom_load": False,
        },
    }


def crop_fraction(size: int) -> float:
    """Compute timm's ``crop_pct`` with which it resizes as the evaluations of this project do.

    timm resizes to the integer part of size / crop_pct, where a rounding error would cost a pixel.

    Args:
        size: Side of the images in pixels.
    """
    resized = weights.resized_side(size)
    crop = size / resized
    return crop if math.floor(size / crop) == resized else math.nextafter(crop, 0)


def _write_detectron2(target: Path, backbone: nn.Module, meta: dict[str, Any]) -> str:
    """Write what MoCo's converter writes (detection/convert-pretrain-to-detectron2.py:20-40), without its pickle.

    Detectron2 unpickles a .pkl, and reads every other suffix with ``torch.load``. In both cases it takes ``model`` and
    ``matching_heuristics`` (detectron2/checkpoint/detection_checkpoint.py:71-113 at 02b5c4e2). A .pth of tensors
    therefore serves, and needs no trust. ``config`` records the settings that must go with the weights.
    """
    if target.suffix not in (".pth", ".pt"):
        raise EvalError(
            f"layout detectron2, target {target}",
            got=f"the suffix {target.suffix or 'none'}",
            expected=".pth, which Detectron2 reads with torch.load",
            fix=f"--to {target.with_suffix('.pth')}",
        )
    model = {to_detectron2(name): value.contiguous() for name, value in weights.backbone_tensors(backbone).items()}
    settings = {
        "MODEL.PIXEL_MEAN": [255 * x for x in meta["mean"]],
        "MODEL.PIXEL_STD": [255 * x for x in meta["std"]],
        "INPUT.FORMAT": "RGB",
        "MODEL.RESNETS.DEPTH": int(meta["arch"].arch.removeprefix("resnet")),
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    _torch_save(target, {"model": model, "__author__": "hpcssl", "matching_heuristics": True, "config": settings})
    return files.sha256_of_file(target)
