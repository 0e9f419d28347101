"""hpcssl: self-supervised pre-training of image encoders on SLURM clusters."""

from importlib import metadata as _metadata

__version__ = "0.1.0"


def _refuse_two_faiss() -> None:
    """faiss-cpu and faiss-gpu install over each other's files: whichever came last wins, half of the other stays."""
    found = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            found.append(f"{name} {_metadata.version(name)}")
        except _metadata.PackageNotFoundError:
            continue
    if len(found) == 2:
        raise ImportError(f"faiss: got both {' and '.join(found)}; expected one of them, since they overwrite each "
                          "other's files; to mend: pip uninstall -y faiss-cpu faiss-gpu, then install hpcssl[cpu] "
                          "or hpcssl[gpu]")


_refuse_two_faiss()


def __getattr__(name: str):
    if name == "load_backbone":  # imported when asked for: status, cancel and logs never pay for torch
        from hpcssl.nets.importers import load_backbone

        return load_backbone
    raise AttributeError(f"module 'hpcssl' has no attribute {name!r}")
