"""Small images, folders and archives of them, and the command ``hpcssl-shard``."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.printed import PrintedError, printed_error

ROOT = Path(__file__).resolve().parents[2]


def encode(number: int, kind: str = "JPEG", side: int = 32, mode: str = "RGB") -> bytes:
    """Encode a smooth color image, a different one for each number."""
    y, x = np.mgrid[0:side, 0:side] / side
    planes = [128 + 120 * np.sin(number + (k + 1) * (3 * x + (number % 7) * y)) for k in range(3)]
    image = Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)
    body = io.BytesIO()
    image.save(body, kind)
    return body.getvalue()


@pytest.fixture
def encode_image():
    """encode_image(number, kind="JPEG", side=32, mode="RGB") -> bytes."""
    return encode


@pytest.fixture
def tree(tmp_path):
    """A source folder: three classes of different sizes, JPEG and PNG, unusual but legal names."""
    src = tmp_path / "photos"
    files = {f"cat/cat-{i}.jpg": encode(i) for i in range(9)}
    files |= {f"dog/{i}.v2.final.JPEG": encode(20 + i) for i in range(5)}
    files |= {f"yak/50% {i}.PNG": encode(40 + i, "PNG") for i in range(4)}
    files |= {"yak/über.jpeg": encode(60), f"yak/{'long' * 50}.jpg": encode(61), "cat/__odd__.jpg": encode(62)}
    for name, body in files.items():
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(body)
    return src


@pytest.fixture
def run_shard():
    """Run ``hpcssl-shard`` in this process; returns its exit code."""
    from data_prep import cli

    def run(*args) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in args])
        return ended.value.code

    return run


@pytest.fixture
def error_of(run_shard, capsys):
    """Run a command that must fail with this exit code; returns the error that it prints."""

    def run(*args, code: int = 1) -> PrintedError:
        capsys.readouterr()
        assert run_shard(*args) == code
        stderr = capsys.readouterr().err
        error = printed_error(stderr)
        assert error.program == "hpcssl-shard" and stderr.strip().splitlines()[-1].startswith("hpcssl-shard: ")
        assert error.fix and "Traceback" not in stderr
        return error

    return run


@pytest.fixture
def run_command():
    """Run ``hpcssl-shard`` as a process of its own, as a user does."""

    def run(*args, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "data_prep", *map(str, args)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )

    return run


@pytest.fixture
def content():
    """The bytes of every file below a folder, by name."""
    return lambda folder: {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


@pytest.fixture
def tar_of():
    """tar_of({name: content}, mode="w") -> a tar archive as bytes."""

    def make(files: dict[str, bytes], mode: str = "w") -> bytes:
        body = io.BytesIO()
        with tarfile.open(fileobj=body, mode=mode) as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return body.getvalue()

    return make
