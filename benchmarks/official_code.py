"""Load official code from the clones of a user, and run it in one process on a CPU. None of it is copied here.

Its files stay unchanged: its classes, its ``train`` functions and its learning rates run as they are. Shims provide
what it needs: a GPU (``.cuda``), a process group, modules that its folder lacks, and our small backbone in place of a
ResNet-50. ``OfficialRun`` is what the comparison needs of each.
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
from hpcssl.train.train_state import TrainState


class StandIn(nn.Module):
    """Our small backbone with the last layer ``fc`` that official code replaces in a ResNet of torchvision."""

    def __init__(self, num_classes: int = 1000, zero_init_residual: bool = False):
        super().__init__()
        self.body = resnet.build(resnet.Arch(arch="resnet_tiny", stem="small"))
        self.fc = nn.Linear(resnet.feature_width(self.body), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


@dataclass
class OfficialRun:
    """An official model with its training.

    Attributes:
        model: The model.
        epoch: (number from 0, loader) -> runs the official ``train`` over one epoch.
        form: Converts our batch to that of the official loader.
        names: Our prefixes of the parameters of the trained network, and theirs.
        slow: The same for its moving average.
        bank: Gives the rows of the bank in the order of slots, and the pointer.
        extra: Step -> further tensors by kind, after that step.
        loss_offset: What our loss has more than theirs, a constant.
        average_after_step: Whether it updates its moving average after the optimizer's step, as ours, and not at the
            start of the next one.
        finish_step: Brings the model to the state in which its next step begins.
    """

    model: nn.Module
    epoch: Callable[[int, object], None]
    form: Callable[[object], object]
    names: dict[str, str]
    slow: dict[str, str] = field(default_factory=dict)
    bank: Callable[[], tuple[Tensor, int]] | None = None
    extra: Callable[[int], dict[str, Tensor]] = lambda _: {}
    loss_offset: float = 0.0
    average_after_step: bool = False
    finish_step: Callable[[], None] = lambda: None

    def take_weights(self, training: TrainState) -> None:
        """Copy the weights of our networks."""
        for branch, names in ((training.pair.online, self.names), (training.pair.target, self.slow)):
            theirs = self.tensors(names)
            with torch.no_grad():
                for name, tensor in weights(branch).items():
                    theirs[name].copy_(tensor)

    def tensors(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Return its parameters and running statistics under our names."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {
            our_prefix + name.removeprefix(their_prefix): tensor
            for our_prefix, their_prefix in names.items()
            for name, tensor in tensors.items()
            if name.startswith(their_prefix)
        }


def weights(branch: nn.Module | None) -> dict[str, Tensor]:
    """Return the parameters and running statistics of one of our networks."""
    if branch is None:
        return {}
    return dict(branch.named_parameters()) | {name: b for name, b in branch.named_buffers() if "running" in name}


@dataclass
class Clone:
    """A clone of an official repository, and the digests of the files that were loaded from it."""

    root: Path
    digests: dict[str, str] = field(default_factory=dict)

    def load(self, file: str, *, stubs: dict[str, types.ModuleType] | None = None) -> types.ModuleType:
        """Load the module at ``file``.

        Its imports find its folder, the root of the clone, and ``stubs`` for packages that are not installed. None of
        these modules stays in ``sys.modules``.
        """
        path = self.root / file
        if not path.is_file():
            raise DataError(
                f"the clone {self.root.name}",
                got=f"no {file}",
                expected="the official code",
                fix="check out a commit that has it; the results name digests of its files",
            )
        folders = [str(path.parent), str(self.root)]
        stubs = {
            "models": stub("models", __path__=[f"{folder}/models" for folder in folders]),
            "models.resnet": stub("models.resnet", resnet_tiny=StandIn),
        } | (stubs or {})
        spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(sys, "path", [*folders, *sys.path]), mock.patch.object(sys, "dont_write_bytecode", True):
            replaced = {name: sys.modules.pop(name) for name in stubs if name in sys.modules}
            before = set(sys.modules)
            sys.modules.update(stubs)
            try:
                spec.loader.exec_module(module)
            finally:
                for name in sys.modules.keys() - before:
                    if name in stubs or self._record(sys.modules[name]):
                        del sys.modules[name]
                sys.modules.update(replaced)
        self._record(module)
        return module

    def load_package(
        self, package: str, names: tuple[str, ...], *, stubs: dict[str, types.ModuleType]
    ) -> dict[str, types.ModuleType]:
        """Load modules of a package that import each other, in this order; ``stubs`` has the package itself.

        Returns:
            The modules by name.
        """
        found = {}
        for name in names:
            full = f"{package}.{name}"
            spec = importlib.util.spec_from_file_location(full, self.root / f"{full.replace('.', '/')}.py")
            module = importlib.util.module_from_spec(spec)
            present = stubs | {f"{package}.{n}": m for n, m in found.items()}
            parents = {full.rpartition(".")[0]} - present.keys()
            present |= {parent: stub(parent, __path__=[]) for parent in parents}
            for key, loaded in found.items():
                setattr(present[package], key.rpartition(".")[2], loaded)
            with mock.patch.dict(sys.modules, present):
                spec.loader.exec_module(module)
            found[name] = module
            self._record(module)
        return found

    def _record(self, module: types.ModuleType) -> bool:
        """Record the digest of the file of a module of this clone; returns whether it is one."""
        spec = getattr(module, "__spec__", None)
        paths = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        own = [Path(path) for path in paths if path and Path(path).is_relative_to(self.root)]
        for path in own:
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                self.digests[str(path.relative_to(self.root))] = digest[:16]
        return bool(own)


def stub(name: str, **attributes) -> types.ModuleType:
    """Return a module with these attributes."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


@contextlib.contextmanager
def single_process(losses: list[float], *, ties: bool) -> Iterator[None]:
    """Provide what official code needs to run in one process.

    ``losses`` receives the value of each tensor on which ``backward`` is called. With ``ties``, a search among equal
    distances, as after ``[...] = 5.0``, takes the lowest slots; torch does not specify which ones it takes.
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
            for owner, name, value in (
                (Tensor, "cuda", here),
                (nn.Module, "cuda", here),
                (torch.cuda, "synchronize", lambda *_: None),
                (Tensor, "backward", recorded),
                (Tensor, "topk", stable if ties else topk),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new tensors with ``dtype``, since official constructors name none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def split_over_gpus(network: nn.Module, gpus: int) -> None:
    """Make a network pass its batch in ``gpus`` parts, as data-parallel code on that many GPUs.

    Each part has batch statistics of its own, and only the first part enters the running statistics. Inputs and outputs
    are tensors, or lists of them.
    """
    whole = network.forward

    def forward(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        parts = []
        pieces = zip(*(t.chunk(gpus) for t in x), strict=True) if isinstance(x, list) else x.chunk(gpus)
        for number, piece in enumerate(pieces):
            kept = [(module, dict(module._buffers)) for module in network.modules()] if number else []
            for module, buffers in kept:
                module._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
            parts.append(whole(list(piece) if isinstance(x, list) else piece))
            for module, buffers in kept:
                module._buffers.update(buffers)
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return [torch.cat(same) for same in zip(*parts, strict=True)]

    network.forward = forward


class TorchWithOrders:
    """torch with a ``randperm`` that returns the orders in which our run shuffles the target's images."""

    def __init__(self, training: TrainState):
        self.training, self.step = training, 0

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def randperm(self, _rows: int) -> Tensor:
        (order,) = self.training.shuffle_orders(self.step)
        self.step += 1
        return order
