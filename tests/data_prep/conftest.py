"""Small real images, trees and archives of them, and the command as a user types it."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def encode(number: int, kind: str = "JPEG", side: int = 32, mode: str = "RGB") -> bytes:
    """A smooth coloured image, another one for every number."""
    y, x = np.mgrid[0:side, 0:side] / side
    planes = [128 + 120 * np.sin(number + (k + 1) * (3 * x + (number % 7) * y)) for k in range(3)]
    image = Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)
    body = io.BytesIO()
    image.save(body, kind)
    return body.getvalue()


@pytest.fixture
def picture():
    return encode


@pytest.fixture
def tree(tmp_path):
    """A source tree: three classes of different sizes, JPEG and PNG, awkward but legal names."""
    src = tmp_path / "photos"
    files = {f"cat/cat-{i}.jpg": encode(i) for i in range(9)}
    files |= {f"dog/{i}.v2.final.JPEG": encode(20 + i) for i in range(5)}
    files |= {f"yak/deep/er/50% {i}.PNG": encode(40 + i, "PNG") for i in range(4)}
    files |= {"yak/über.jpeg": encode(60), f"yak/{'long' * 50}.jpg": encode(61), "cat/__odd__.jpg": encode(62)}
    for name, body in files.items():
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(body)
    return src


@pytest.fixture
def shard():
    """Run ``hpcssl-shard`` in this process, with one worker unless told; returns its exit code."""
    from data_prep import cli

    def run(*args) -> int:
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(a) for a in args])
        return leaving.value.code

    return run


@pytest.fixture
def refused(shard, capsys):
    """Run a command that must fail; returns its one sentence after checking that it has four parts."""

    def run(*args, code: int = 1) -> str:
        capsys.readouterr()
        assert shard(*args) == code
        lines = capsys.readouterr().err.strip().splitlines()
        sentence = lines[-1]
        assert sentence.startswith("hpcssl-shard: ")
        for part in (": got ", "; expected ", "; to mend: "):
            assert part in sentence, sentence
        assert "Traceback" not in sentence
        return sentence

    return run


@pytest.fixture
def command():
    """Run ``hpcssl-shard`` as a process of its own, as a user does."""

    def run(*args, **options) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "data_prep", *map(str, args)], cwd=ROOT, capture_output=True,
                              text=True, timeout=120, **options)

    return run


@pytest.fixture
def content():
    """The bytes of every file below a folder, by name."""
    return lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes()
                           for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def tar_of():
    """A tar archive as bytes, from names and contents."""

    def make(files: dict[str, bytes], mode: str = "w") -> bytes:
        body = io.BytesIO()
        with tarfile.open(fileobj=body, mode=mode) as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return body.getvalue()

    return make
