"""A training step on a GPU and with ranks that are not there: what it would launch, copy, send and wait for.

Tensors are fake: they have a shape, a type and the device ``cuda:0``, and no values (``FakeTensorMode``). The process
group is fake as well: rank 0 of any number, whose collectives return at once. So the step of a recipe at its real size
runs in seconds on any machine, and every operation passes ``Recorder``, which counts it. An operation on tensors of two
devices raises an error, as it would on a GPU.

What is different from a GPU:

* A value that the host reads is 0, so that a branch on data takes the way of a step without any event.
* torch's autograd engine looks for a driver where it meets a CUDA device. Here its question for the device gets
  another one (``_ENGINE_DEVICE``), which needs none. Code in Python sees ``cuda:0``.
* For that reason autocast cannot see that tensors are on a GPU. ``_FunctionMode`` casts the inputs of the products and
  convolutions instead, which are all that the encoders use in the lower precision.
* ``DistributedDataParallel`` reads values in its constructor. ``BucketedGradients`` takes its place and sends the
  buckets that the real one would; a test compares the two.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import hpcssl

DEVICE = torch.device("cuda", 0)
_ENGINE_DEVICE = torch.device("meta", 7)
_PREFIX = str(Path(hpcssl.__file__).parent) + os.sep
_TRANSFERS = "distributed/devices.py"  # whose copies are counted for who asks for them
_aten = torch.ops.aten
# operations whose result has as many rows as there are values of a kind: the host waits for the number
_READS_SHAPE = {
    _aten.nonzero.default: lambda x: x.new_empty(x.numel(), x.dim(), dtype=torch.int64),
    _aten.masked_select.default: lambda x, mask: x.new_empty(mask.numel()),
    _aten._unique2.default: lambda x, *_: tuple(
        x.new_empty(x.numel(), dtype=t) for t in (x.dtype, torch.int64, torch.int64)
    ),
}


def _like_channels(x: Tensor, count: int) -> tuple[Tensor, ...]:
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return tuple(x.new_empty(x.shape[1], dtype=dtype) for _ in range(count))


SYNC_NORM_SHAPES: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": lambda x, *_: _like_channels(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *_: _like_channels(x, 2),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, x, *_: _like_channels(x, 4),
    "batch_norm_backward_elemt": lambda grad, *_: torch.empty_like(grad),
}
"""The results of torch's kernels of SyncBatchNorm, which have no rule for shapes: by name, without values."""
_SHAPES = {getattr(_aten, name).default: rule for name, rule in SYNC_NORM_SHAPES.items()}
_NO_WORK = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view", "is_same_size", "set_", "resize_")
_LOW_PRECISION = {
    torch.conv2d,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.nn.functional.linear,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
}


@dataclass(frozen=True)
class Collective:
    """One collective of a rank.

    Attributes:
        kind: What it is called.
        sent: Bytes that this rank gives.
        received: Bytes that it gets.
        ranks: Number of ranks that take part.
        gradients: Whether it is DDP's.
    """

    kind: str
    sent: int
    received: int
    ranks: int
    gradients: bool = False


@dataclass
class Trace:
    """What one step did.

    Attributes:
        operations: Operations of the GPU that do work (no views, no allocations), by name. A ``_foreach`` is one.
        parts: The same operations by the folder of the package that the innermost function is of, e.g. ``views``.
            Operations of a backward pass are those of ``train``, which calls it.
        waits: Why the host waited for the GPU and where in the package, e.g. ``item at train/step.py train_step``.
        copies: Bytes copied to the device, by ``blocking`` or ``asynchronous``.
        collectives: In order.
        flops: Floating-point operations of products and convolutions; a multiplication and an addition are two.
    """

    operations: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    collectives: list[Collective] = field(default_factory=list)
    flops: int = 0

    @property
    def launches(self) -> int:
        return sum(self.operations.values())

    def by_kind(self) -> dict[str, tuple[int, int, int]]:
        """For each kind of collective: how many, and the bytes that a rank gives and gets."""
        result: dict[str, tuple[int, int, int]] = {}
        for c in self.collectives:
            count, sent, received = result.get(c.kind, (0, 0, 0))
            result[c.kind] = count + 1, sent + c.sent, received + c.received
        return dict(sorted(result.items()))


class Recorder(TorchDispatchMode):
    """Counts what passes, and answers what fake tensors cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.true_device = False  # whether the engine's question for a device gets the true answer

    def wait(self, kind: str) -> None:
        self.trace.waits[f"{kind} at {_call_site()}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            device = func(*args)
            return _ENGINE_DEVICE if device == DEVICE and not self.true_device else device
        if kwargs.get("device") == _ENGINE_DEVICE:
            kwargs = kwargs | {"device": DEVICE}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == "cuda" for x in inputs)
        if func is _aten._local_scalar_dense.default:
            if on_gpu:
                self.wait("item")
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].dtype.is_floating_point else 0)
        if func in _READS_SHAPE:
            if on_gpu:
                self.wait(func.overloadpacket.__name__)
                self._count(func)
            return _READS_SHAPE[func](*args)
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            args = self._index_by_masks(args)
        in_place_on_lists = not func._schema.returns  # of tensors: torch has no shape rule for the fused optimizers
        result = None if in_place_on_lists else _SHAPES.get(func, func)(*args, **kwargs)
        if func in (_aten.convolution.default, _aten.convolution_backward.default):
            result = _keep_layout(result, inputs)
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self._note_copy(func, args, kwargs, inputs, outputs)
        if (on_gpu or any(x.device.type == "cuda" for x in outputs)) and _does_work(func):
            self._count(func)
            if func.overloadpacket in flop_registry:
                self.trace.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _count(self, func: Any) -> None:
        self.trace.operations[func.overloadpacket.__name__] += 1
        self.trace.parts[_package_frame(_TRANSFERS)[0].split("/")[0]] += 1

    def _index_by_masks(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace masks by the indices of their true entries, which is what the operation does, and waits for."""
        indices: list[Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            if index.device.type == "cuda":
                self.wait("index by a mask")
            indices += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        return (args[0], indices, *args[2:])

    def _note_copy(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if func is _aten._to_copy.default:
            source, target, asynchronous = inputs[0], outputs[0], kwargs.get("non_blocking", False)
        elif func is _aten.copy_.default:
            target, source = args[:2]
            asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            return
        if source.device.type == target.device.type:
            return
        if target.device.type == "cuda":
            kind = "asynchronous" if asynchronous else "blocking"
            self.trace.copies[kind] += target.numel() * target.element_size()
        if not asynchronous:
            self.wait("copy to the GPU" if target.device.type == "cuda" else "copy to the host")

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__.strip("_").replace("_base", "")
        tensors = [[x for x in pytree.tree_leaves(a) if isinstance(x, Tensor)] for a in args[:2]]
        for x in itertools.chain(*tensors):
            if x.device.type != "cuda":
                raise RuntimeError(f"{name} of a tensor on {x.device}: NCCL takes those of a GPU alone")
        sizes = [sum(x.numel() * x.element_size() for x in group) for group in tensors]
        received, sent = (sizes[0], sizes[1]) if sizes[1] else (sizes[0], sizes[0])
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        self.trace.collectives.append(Collective(name, sent, received, group.size(), _sends_gradients()))
        return func(*args, **kwargs)


def _keep_layout(result: Any, inputs: list[Tensor]) -> Any:
    """Give the images that a convolution returns the layout of its images, as cuDNN does, but not the shape rule."""

    def in_layout(x: Any) -> Any:
        is_image = isinstance(x, Tensor) and x.dim() == 4
        return torch.empty_like(x, memory_format=torch.channels_last) if is_image else x

    is_last = any(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    return pytree.tree_map(in_layout, result) if is_last else result


def _call_site() -> str:
    """The innermost function of the package that is running, as ``nets/pair.py embed``."""
    return " ".join(_package_frame()).strip()


def _package_frame(besides: str = "") -> tuple[str, str]:
    """File and name of the innermost function of the package, but for those of the file ``besides``."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PREFIX) and name != _PREFIX + besides:
            return name.removeprefix(_PREFIX).replace(os.sep, "/"), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "outside of the package", ""


def _sends_gradients() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is BucketedGradients._reduce.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _does_work(func: Any) -> bool:
    """Whether an operation launches a kernel or a copy: it is no view and no allocation."""
    if func.overloadpacket.__name__ in _NO_WORK:
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class _FunctionMode(TorchFunctionMode):
    """Autocast, and the true device for Python code that asks by ``is_cuda``."""

    dtype: torch.dtype | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cast: dict[int, tuple[Tensor, Tensor]] = {}  # of the weights, once per context as in torch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_cuda.__get__:
            return args[0].device.type == "cuda"
        if self.dtype is not None and func in _LOW_PRECISION:
            args, kwargs = pytree.tree_map_only(Tensor, self._lower, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cuda":
            return x
        assert self.dtype is not None
        if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
            return x.to(self.dtype)
        if id(x) not in self.cast:
            self.cast[id(x)] = x, x.to(self.dtype)
        return self.cast[id(x)][1]


def _make_autocast(mode: _FunctionMode) -> Any:
    @contextlib.contextmanager
    def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any) -> Iterator[None]:
        before, mode.dtype = mode.dtype, dtype if enabled else None
        try:
            yield
        finally:
            mode.dtype = before
            if before is None:
                mode.cast.clear()

    return autocast


class BucketedGradients(nn.parallel.DistributedDataParallel):
    """Sends what ``DistributedDataParallel`` sends for one backward pass: buckets, and which parameters were used."""

    def __init__(
        self, module: nn.Module, *, bucket_cap_mb: float = 25, find_unused_parameters: bool = False, **_: Any
    ) -> None:
        nn.Module.__init__(self)
        self.module, self._sends = module, True
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._first = parameters[0]
        device = self._first.device
        first = dist._DEFAULT_FIRST_BUCKET_BYTES  # type: ignore[attr-defined]
        limits = [first, int(bucket_cap_mb * 2**20)] if find_unused_parameters else [sys.maxsize]
        with torch.utils._python_dispatch._disable_current_modes():
            shapes = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in parameters]
            buckets, _limits = dist._compute_bucket_assignment_by_size(shapes, limits)  # type: ignore[attr-defined]
        self._buckets = [torch.empty(sum(parameters[i].numel() for i in b), device=device) for b in buckets]
        self._used = torch.zeros(len(parameters), dtype=torch.int32, device=device) if find_unused_parameters else None
        self._first.register_post_accumulate_grad_hook(self._reduce)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._sends = False
        try:
            yield
        finally:
            self._sends = True

    def _reduce(self, _parameter: Tensor) -> None:
        if not self._sends:
            return
        for bucket in self._buckets:
            dist.all_reduce(bucket)
        if self._used is not None:
            dist.all_reduce(self._used)


class _Event:
    """``torch.cuda.Event``: whoever synchronizes with it waits."""

    recorder: Recorder

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.recorder.wait("event")


class _Stream:
    """``torch.cuda.Stream``."""

    recorder: Recorder

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        self.recorder.wait("stream")


def _apply_to_parameters(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, which cannot exchange the data of fake tensors: set new parameters instead."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    part._parameters[name] = nn.Parameter(fn(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else fn(buffer)
    return module


@contextlib.contextmanager
def fake_gpu(ranks: int = 1) -> Iterator[Recorder]:
    """Make ``cuda:0`` a device of fake tensors, in a process group of this number of ranks; not for several threads."""
    recorder, functions = Recorder(), _FunctionMode()
    event, stream = (type(c.__name__, (c,), {"recorder": recorder}) for c in (_Event, _Stream))
    group_tensors = torch._C._group_tensors_by_device_and_dtype
    to_numpy = Tensor.numpy

    def group_by_true_device(*args: Any) -> Any:
        recorder.true_device = True
        try:
            return group_tensors(*args)
        finally:
            recorder.true_device = False

    def numpy(x: Tensor, **options: Any) -> Any:
        if not isinstance(x, FakeTensor):
            return to_numpy(x, **options)
        if x.device.type == "cuda":
            raise TypeError("numpy() of a tensor on cuda:0")
        return np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch."))

    def tolist(x: Tensor) -> Any:
        if x.device.type == "cuda":
            recorder.wait("tolist")
        return np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch.")).tolist()

    replaced = [
        (nn.Module, "_apply", _apply_to_parameters),
        (nn.parallel, "DistributedDataParallel", BucketedGradients),
        (Tensor, "numpy", numpy),
        (FakeTensor, "tolist", tolist),
        (Tensor, "pin_memory", lambda x, *_: x),
        (Tensor, "record_stream", lambda x, *_: None),
        (torch, "autocast", _make_autocast(functions)),
        (_foreach_utils, "_foreach_supported_types", [Tensor, nn.Parameter, FakeTensor]),
        (torch._C, "_group_tensors_by_device_and_dtype", group_by_true_device),
        (torch.cuda, "Event", event),
        (torch.cuda, "Stream", stream),
        (torch.cuda, "current_stream", lambda *_: stream()),
        (torch.cuda, "stream", lambda *_: contextlib.nullcontext()),
        (torch.cuda, "synchronize", lambda *_: recorder.wait("device")),
    ]
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        stack.enter_context(functions)
        yield recorder
