"""Labels that do not come from folder names: text files, and the devkit of ILSVRC 2012."""

from __future__ import annotations

import io
import posixpath
import tarfile
from pathlib import Path

from data_prep.catalogue import read_names
from hpcssl.errors import ConfigError, DataError

TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def read_labels(path: Path) -> dict[str, str]:
    """``name class`` lines: the class is the last word, or what follows a tab where the line holds one."""
    labels: dict[str, str] = {}
    for line in read_names(path, "--labels"):
        name, _, label = line.rpartition("\t") if "\t" in line else _last_word(line)
        name, label = name.strip().removeprefix("./"), label.strip()
        if not name or not label:
            raise ConfigError(f"--labels {path}", got=f"the line {line!r}", expected="lines `name class`",
                              mend="give each image's name and its class, separated by a blank or a tab")
        if labels.setdefault(name, label) != label:
            raise ConfigError(f"--labels {path}", got=f"{name} as {labels[name]} and as {label}",
                              expected="one class per image", mend="remove one of the lines")
    return labels


def _last_word(line: str) -> tuple[str, str, str]:
    name, *rest = line.rsplit(None, 1)
    return (name, " ", rest[0]) if rest else ("", "", name)


def read_devkit(path: Path) -> dict[str, str]:
    """File name -> WordNet id of the validation images, from ILSVRC2012_devkit_t12.tar.gz.

    The n-th line of the ground truth is the ILSVRC2012_ID of ILSVRC2012_val_%08d with n counted from 1; meta.mat
    maps ids to WordNet ids.
    """
    from scipy.io import loadmat, matlab  # scikit-learn brings it, and only this verb needs it

    what = f"--devkit {path}"
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for info in tar:
                if posixpath.basename(info.name) in (TRUTH, META) and info.isreg():
                    parts[posixpath.basename(info.name)] = tar.extractfile(info).read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(what, got=f"{error}", expected="ILSVRC2012_devkit_t12.tar.gz as downloaded",
                          mend="check the path, or download it again") from error
    absent = [name for name in (TRUTH, META) if name not in parts]
    if absent:
        raise ConfigError(what, got=f"no {' and no '.join(absent)} in it", expected=f"data/{TRUTH} and data/{META}",
                          mend="give the devkit of tasks 1 and 2 (ILSVRC2012_devkit_t12.tar.gz)")
    try:
        synsets = loadmat(io.BytesIO(parts[META]), squeeze_me=True, struct_as_record=False)["synsets"]
        wnid = {int(s.ILSVRC2012_ID): str(s.WNID) for s in synsets.ravel()}
        truth = [wnid[int(line)] for line in parts[TRUTH].split()]
    except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError, matlab.MatReadError) as error:
        raise DataError(what, got=f"ids that cannot be resolved ({type(error).__name__}: {error})",
                        expected=f"numbers in {TRUTH} that {META} maps to WordNet ids",
                        mend="download the devkit again") from error
    return {f"ILSVRC2012_val_{n:08d}.JPEG": name for n, name in enumerate(truth, 1)}
