"""hpcssl: self-supervised pre-training of image encoders on SLURM clusters.

Example:
    Train, evaluate, and load the encoder, all in this process::

        import hpcssl

        data = {"train": "data/digits/train", "val": "data/digits/val"}
        run = hpcssl.train("digits_msf", run="runs/first", data=data)
        rows = hpcssl.evaluate("knn", run=run)
        backbone, transform = run.encoder()  # or hpcssl.load_backbone("runs/first"), or a file of another project
        features = backbone(transform(image)[None])  # image: a PIL image
        features = hpcssl.embed("runs/first", "photos").features  # of a folder of images

    On a cluster::

        submitted = hpcssl.submit("msf_r50_ep200_128k", run="runs/msf", sbatch={"nodes": 2, "gpus-per-node": 4})
        submitted.wait()

``import hpcssl`` imports neither torch nor any of these functions: each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from importlib import metadata as _metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect

    from hpcssl.api import Records as Records
    from hpcssl.api import Run as Run
    from hpcssl.api import evaluate as evaluate
    from hpcssl.api import train as train
    from hpcssl.inference.embed import embed as embed
    from hpcssl.nets.importers import load_backbone as load_backbone
    from slurm.api import submit as submit

__version__ = "0.2.0"

_HOMES = {
    "Records": "hpcssl.api",
    "Run": "hpcssl.api",
    "embed": "hpcssl.inference.embed",
    "evaluate": "hpcssl.api",
    "load_backbone": "hpcssl.nets.importers",
    "submit": "slurm.api",
}
"""Module of each public name. ``train`` is missing: its package ``hpcssl.train`` can be called."""


def _refuse_two_faiss() -> None:
    """Raise an error if faiss-cpu and faiss-gpu are both installed.

    They install over each other's files: the last one wins, and parts of the other one remain.
    """
    installed = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            installed.append(f"{name} {_metadata.version(name)}")
        except _metadata.PackageNotFoundError:
            continue
    if len(installed) == 2:
        raise ImportError(
            f"faiss: both {' and '.join(installed)} (expected one of them, since they overwrite each other's files). "
            "Fix: pip uninstall -y faiss-cpu faiss-gpu, then `pip install -e '.[cpu]'` or `'.[gpu]'` in the clone"
        )


_refuse_two_faiss()


class CallablePackage(ModuleType):
    """The class of the package ``hpcssl.train``, which is at the same time the function of this name.

    Importing any module of a package sets the package as an attribute of its parent, so that a function of the same
    name would be lost. Calling the package calls ``hpcssl.api.train``.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train a recipe: see ``hpcssl.api.train``."""
        from hpcssl.api import train

        return train(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # what help systems show
        import inspect

        from hpcssl.api import train

        return inspect.signature(train)


if not TYPE_CHECKING:  # a type checker takes the names from above, and reports those that are misspelled

    def __getattr__(name: str) -> Any:
        if name == "train":
            return importlib.import_module("hpcssl.train")
        if name not in _HOMES:
            raise AttributeError(f"module 'hpcssl' has no attribute {name!r}")
        from hpcssl.cli_runner import import_own

        return getattr(import_own(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), *_HOMES, "train"])
