"""The resume file of an unfinished evaluation.

One safetensors file per evaluation, replaced atomically and bound to the evaluation's identity, so that an evaluation
never resumes from the state of another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hpcssl.nets import tensor_file
from hpcssl.nets.tensor_file import DamagedFileError

LOG = logging.getLogger("hpcssl")


def write(path: Path, identity: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Replace the resume file.

    Args:
        path: The file.
        identity: Identity of the evaluation; ``read`` returns the content to this evaluation only.
        tensors: Named tensors.
        note: Plain values (JSON).

    Raises:
        OSError: The file cannot be written.
    """
    tensor_file.write(path, tensors, {"identity": identity, "note": json.dumps(note)})


def read(path: Path | None, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the note that an earlier attempt at the same evaluation wrote.

    None if there is no file, if it cannot be read or is damaged, or if it belongs to another evaluation.
    """
    if path is None or not path.exists():
        return None
    try:
        tensors, metadata = tensor_file.read(path)
    except (OSError, DamagedFileError) as error:
        LOG.warning("%s is not used, and the evaluation starts again: it is %s.", path, error)
        return None
    return (tensors, json.loads(metadata["note"])) if metadata.get("identity") == identity else None
