"""Any known encoder as a file of this project, of torchvision, of timm or of Detectron2."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError, nearest
from hpcssl.nets import importers, resnet, weights
from hpcssl.nets.importers import Source
from hpcssl.nets.layouts import to_detectron2

LAYOUTS = ("hpcssl", "torchvision", "timm", "detectron2")


def export(source: Source | Path | str, target: Path | str, layout: str = "hpcssl") -> str:
    """Write the encoder of ``source``, any file that ``importers.load`` reads, in another layout. Returns the sha256 of
    ``target``, or of the weights in it where it is a folder.

    ``hpcssl``: our own; a file of ours that nothing is changed of is copied byte for byte. ``torchvision``: its key
    names without ``fc``, as safetensors, or for a target that ends in .pth or .pt as a state dict for ``torch.load``.
    ``timm``: the same two, which ``timm.create_model(NAME, num_classes=0, checkpoint_path=FILE)`` reads; a target
    without a suffix is a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, which knows the
    normalisation too. ``detectron2``: a .pth for MODEL.WEIGHTS. A layout that cannot hold the architecture, and a
    suffix that its reader would take for something else, are an ``EvalError``.
    """
    if layout not in LAYOUTS:
        raise ConfigError("--layout", got=repr(layout), expected="a known layout", mend=nearest(layout, LAYOUTS))
    source, target = Source.of(source), Path(target)
    if target.is_dir():
        raise EvalError(f"layout {layout}, target {target}", got="a folder that exists", expected="a path to write",
                        mend="name another one, such as FOLDER/encoder.safetensors")
    backbone, meta = importers.load(source)
    if layout == "hpcssl":
        if source.plain and meta["format"] == weights.FORMAT:
            files.atomic_write(target, Path(source.path).read_bytes())
            return files.digest(target)
        return weights.save(target, backbone, **{name: value for name, value in meta.items() if name != "format"})
    arch = meta["arch"]
    if arch.stem != "imagenet" or arch.arch not in resnet.RESNETS:
        raise EvalError(f"layout {layout}", got=f"{arch.arch} with the {arch.stem} stem",
                        expected="a ResNet that torchvision itself builds",
                        mend="take --layout hpcssl, which `hpcssl.load_backbone` reads")
    if layout == "detectron2":
        return _detectron2(target, backbone, meta)
    tensors = {name: value.contiguous() for name, value in weights.state_of(backbone).items()}
    if layout == "timm" and not target.suffix:
        return _timm_folder(target, tensors, meta, resnet.width_of(backbone))
    return _write(target, tensors)


def _write(target: Path, tensors: dict[str, Tensor]) -> str:
    if target.suffix in (".pth", ".pt"):
        _torch_save(target, tensors)
    else:
        files.atomic_write(target, weights.pack(tensors, {"format": "pt"}))
    return files.digest(target)


def _torch_save(target: Path, content: dict) -> None:
    body = io.BytesIO()
    torch.save(content, body)
    files.atomic_write(target, body.getvalue())


def _timm_folder(target: Path, tensors: dict[str, Tensor], meta: dict, width: int) -> str:
    """``config.json`` and ``model.safetensors`` as timm 1.0 keeps them (timm/models/_hub.py: save_config_for_hf,
    load_model_config_from_path)."""
    if target.exists():
        raise EvalError(f"layout timm, target {target}", got="a file that exists", expected="a folder to make",
                        mend="name another one, or a file that ends in .safetensors or .pth")
    size = meta["size"]
    config = {"architecture": meta["arch"].arch, "num_classes": 0, "num_features": width, "global_pool": "avg",
              "pretrained_cfg": {"input_size": [3, size, size], "mean": meta["mean"], "std": meta["std"],
                                 "crop_pct": crop_of(size), "crop_mode": "center", "interpolation": "bilinear",
                                 "fixed_input_size": False, "pool_size": None, "num_classes": 0,
                                 "first_conv": "conv1", "classifier": "fc", "custom_load": False}}
    with files.atomic_dir(target) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(weights.pack(tensors, {"format": "pt"}))
    return files.digest(target / "model.safetensors")


def crop_of(size: int) -> float:
    """timm's ``crop_pct`` for which it resizes as our evaluations do. It takes the whole part of size / crop_pct, where
    a rounding error would cost a pixel."""
    seen = round(size * 256 / 224) if size > weights.WHOLE_UP_TO else size
    crop = size / seen
    return crop if math.floor(size / crop) == seen else math.nextafter(crop, 0)


def _detectron2(target: Path, backbone: nn.Module, meta: dict) -> str:
    """What MoCo's converter writes (detection/convert-pretrain-to-detectron2.py:20-40), without its pickle.

    Detectron2 unpickles a .pkl, and reads every other suffix with ``torch.load``; of both it takes ``model`` and
    ``matching_heuristics`` (detectron2/checkpoint/detection_checkpoint.py:71-113 at 02b5c4e2). So a .pth of tensors
    does, and needs no trust. ``config`` tells the settings that must go with it.
    """
    if target.suffix not in (".pth", ".pt"):
        raise EvalError(f"layout detectron2, target {target}", got=f"the suffix {target.suffix or 'none'}",
                        expected=".pth, which Detectron2 reads with torch.load",
                        mend=f"--to {target.with_suffix('.pth')}")
    model = {to_detectron2(name): value.contiguous() for name, value in weights.state_of(backbone).items()}
    settings = {"MODEL.PIXEL_MEAN": [255 * x for x in meta["mean"]], "MODEL.PIXEL_STD": [255 * x for x in meta["std"]],
                "INPUT.FORMAT": "RGB", "MODEL.RESNETS.DEPTH": int(meta["arch"].arch.removeprefix("resnet")),
                "MODEL.RESNETS.STRIDE_IN_1X1": False}
    _torch_save(target, {"model": model, "__author__": "hpcssl", "matching_heuristics": True, "config": settings})
    return files.digest(target)
