"""Official code, loaded from a user's clones and made to run in one process on a CPU. Nothing of it is kept here.

What is foreign stays as it is on disk: its classes, its ``train`` functions and its rates run unchanged. What it takes
for granted is given by shims: a GPU (``.cuda``), a process group, modules that its folder lacks, and our small
backbone in the place of a ResNet-50. ``Side`` is what the comparison asks of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from hpcssl.errors import DataError
from hpcssl.nets import resnet
from hpcssl.train.state import Training


class StandIn(nn.Module):
    """Our small backbone with what official code expects of a torchvision ResNet: a last layer ``fc`` to replace."""

    def __init__(self, num_classes: int = 1000, zero_init_residual: bool = False):
        super().__init__()
        self.body = resnet.build(resnet.Arch(arch="resnet_tiny", stem="small"))
        self.fc = nn.Linear(resnet.width_of(self.body), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


@dataclass
class Side:
    """An official model with its training.

    ``epoch(number, loader)`` runs the official ``train`` over one epoch, from 0. ``form`` makes a batch as its loader
    gives it. ``names``: our prefixes of parameters and theirs, of the trained network and (``slow``) of its average.
    ``bank``: the rows in slot order, and the pointer. ``extra(step)``: further tensors by kind, after that step.
    ``settle``: bring the model to the form in which its next step begins.
    """

    model: nn.Module
    epoch: Callable[[int, object], None]
    form: Callable[[object], object]
    names: dict[str, str]
    slow: dict[str, str] = field(default_factory=dict)
    bank: Callable[[], tuple[Tensor, int]] | None = None
    extra: Callable[[int], dict[str, Tensor]] = lambda _: {}
    settle: Callable[[], None] = lambda: None

    def take_weights(self, training: Training) -> None:
        """Start from our networks' weights."""
        for branch, names in ((training.pair.online, self.names), (training.pair.target, self.slow)):
            theirs = self.tensors(names)
            with torch.no_grad():
                for name, tensor in weights(branch).items():
                    theirs[name].copy_(tensor)

    def tensors(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Its parameters and running statistics under our names."""
        found = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {mine + name.removeprefix(his): tensor for mine, his in names.items()
                for name, tensor in found.items() if name.startswith(his)}


def weights(branch: nn.Module | None) -> dict[str, Tensor]:
    """Parameters and running statistics of one of our networks."""
    if branch is None:
        return {}
    return dict(branch.named_parameters()) | {name: b for name, b in branch.named_buffers() if "running" in name}


@dataclass
class Clone:
    """A clone of an official repository, and the digests of the files that were loaded from it."""

    root: Path
    digests: dict[str, str] = field(default_factory=dict)

    def load(self, file: str, *, stubs: dict[str, types.ModuleType] | None = None) -> types.ModuleType:
        """The module at ``file``, whose imports find its own folder, the clone's root, and ``stubs`` in the place of
        what is not installed. Nothing of it stays in ``sys.modules``."""
        path = self.root / file
        if not path.is_file():
            raise DataError(f"the clone {self.root.name}", got=f"no {file}", expected="the official code",
                            mend="check out a commit that has it; the results name digests of its files")
        folders = [str(path.parent), str(self.root)]
        stubs = {"models": stub("models", __path__=[f"{folder}/models" for folder in folders]),
                 "models.resnet": stub("models.resnet", resnet_tiny=StandIn)} | (stubs or {})
        spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(sys, "path", [*folders, *sys.path]), mock.patch.object(sys, "dont_write_bytecode", True):
            kept = {name: sys.modules.pop(name) for name in stubs if name in sys.modules}
            before = set(sys.modules)
            sys.modules.update(stubs)
            try:
                spec.loader.exec_module(module)
            finally:
                for name in sys.modules.keys() - before:
                    if name in stubs or self._note(sys.modules[name]):
                        del sys.modules[name]
                sys.modules.update(kept)
        self._note(module)
        return module

    def _note(self, module: types.ModuleType) -> bool:
        """Whether the module is of this clone; if so its file's digest is kept."""
        spec = getattr(module, "__spec__", None)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        own = [Path(place) for place in places if place and Path(place).is_relative_to(self.root)]
        for path in own:
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                self.digests[str(path.relative_to(self.root))] = digest[:16]
        return bool(own)


def stub(name: str, **attributes) -> types.ModuleType:
    """A module of these attributes."""
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


@contextlib.contextmanager
def one_process(losses: list[float], *, ties: bool) -> Iterator[None]:
    """What official code needs to run here; ``losses`` takes the value of each tensor whose backward pass is asked for.

    ``ties``: where a search has equal distances, as after ``[...] = 5.0``, the lowest slots are taken; torch leaves
    the choice open.
    """
    backward, topk = Tensor.backward, Tensor.topk

    def recorded(self, *args, **kwargs):
        losses.append(float(self.detach()))
        return backward(self, *args, **kwargs)

    def stable(self, k, dim=-1, largest=True, sorted=True):
        values, order = self.sort(dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), order.narrow(dim, 0, k)))

    def here(self, *args, **kwargs):
        return self

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, value in ((Tensor, "cuda", here), (nn.Module, "cuda", here),
                                       (torch.cuda, "synchronize", lambda *_: None), (Tensor, "backward", recorded),
                                       (Tensor, "topk", stable if ties else topk)):
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of ``dtype``: official constructors name none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
