"""Write an encoder in any layout: for this project, other projects, ONNX or the Hugging Face libraries."""

from __future__ import annotations

from pathlib import Path

from hpcssl.errors import ConfigError, suggest
from hpcssl.inference.hf_folder import write_hf_folder
from hpcssl.inference.onnx_file import write_onnx
from hpcssl.nets import exporters
from hpcssl.nets.importers import WeightsSource

LAYOUTS = (*exporters.LAYOUTS, "onnx", "hf")
"""All layouts that can be written."""


def export(source: WeightsSource | Path | str, target: Path | str, layout: str = "hpcssl") -> str:
    """Write the encoder of a file in another layout.

    Args:
        source: Any file that ``importers.load`` reads.
        target: The file or folder to write.
        layout: One of ``LAYOUTS``. ``onnx`` gives a .onnx file (``write_onnx``), ``hf`` a folder
            (``write_hf_folder``), the others what ``exporters.export`` says.

    Returns:
        The sha256 of ``target``, or of the weights in it where it is a folder.

    Raises:
        ConfigError: The layout is unknown, the name is that of another layout, or a package that it needs is missing.
        EvalError: The source cannot be read, or the layout cannot hold it.
    """
    if layout not in LAYOUTS:
        raise ConfigError("--layout", got=repr(layout), expected="a known layout", fix=suggest(layout, LAYOUTS))
    source, target = WeightsSource.coerce(source), Path(target)
    if target.suffix == ".onnx" and layout != "onnx":
        raise ConfigError(
            f"--to {target}",
            got=f"the suffix '.onnx' with --layout {layout}",
            expected="a file of the layout that its name says",
            fix="add --layout onnx, or choose another name",
        )
    if layout == "onnx":
        return write_onnx(source, target)
    if layout == "hf":
        return write_hf_folder(source, target)
    return exporters.export(source, target, layout)
