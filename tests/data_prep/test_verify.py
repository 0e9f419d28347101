"""``verify`` names what is damaged, and nothing else."""

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest

from data_prep import tars
from hpcssl.data.shards import ShardSet


@pytest.fixture
def out(tree, tmp_path, shard):
    assert shard("images", tree, tmp_path / "out", "--samples-per-shard", 6, "--workers", 1) == 0
    return tmp_path / "out"


@pytest.fixture
def verify(shard, capsys):
    def run(out, *args):
        capsys.readouterr()
        code = shard("verify", out, "--workers", 1, *args)
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return run


def flip(path, at, bit=1):
    body = bytearray(path.read_bytes())
    body[at] ^= bit
    path.write_bytes(body)


def test_a_whole_folder_is_one_line(out, verify):
    for extra in ((), ("--quick",)):
        code, lines, err = verify(out, *extra)
        assert (code, len(lines), err) == (0, 1, "") and "21 samples of 3 classes in 4 shards" in lines[0]


def test_every_flipped_byte_is_found_and_laid_to_its_sample(out, verify):
    """One byte at a time all over a shard: headers, image, padding, label, note, end mark."""
    found = ShardSet.open(out)
    path = found.path(1)
    whole = path.read_bytes()
    rows = found.rows[found.rows["shard"] == 1]
    edges = tars.extents(rows, len(whole))
    first = int(np.flatnonzero(found.rows["shard"] == 1)[0])
    for at in [*range(0, len(whole), 397), 600, 1025, len(whole) - 3]:
        flip(path, at, 0x10)
        code, lines, err = verify(out)
        assert code == 1 and "shard-000001.tar" in err
        assert lines[0] == "shard-000001.tar\tanother sha256 than the index records"
        assert len(lines) == 2, (at, lines)
        if at >= edges[-1]:
            assert lines[1] == "shard-000001.tar\tthe end mark is damaged"
        else:
            hit = int(np.searchsorted(edges, at, "right")) - 1
            assert f"\tsample {first + hit}\t" in lines[1], (at, lines)
        path.write_bytes(whole)


def test_the_damaged_sample_is_named(out, command):
    found = ShardSet.open(out)
    row = found.rows[8]
    flip(found.path(row["shard"]), int(row["offset"]) + int(row["size"]) // 2)
    done = command("verify", out)
    assert done.returncode == 1
    assert f"sample 8\t{found.key(8)}\t" in done.stdout
    assert done.stderr.count("\n") == 1 and "; to mend: " in done.stderr and "Traceback" not in done.stderr


def test_truncated_shard_and_its_lost_samples(out, verify):
    found = ShardSet.open(out)
    path, rows = found.path(2), found.rows[found.rows["shard"] == 2]
    cut = int(rows["offset"][3]) + 10
    path.write_bytes(path.read_bytes()[:cut])
    first = int(np.flatnonzero(found.rows["shard"] == 2)[0])
    for extra in ((), ("--quick",)):
        code, lines, _ = verify(out, *extra)
        assert code == 1 and lines[0].startswith(f"shard-000002.tar\t{cut} bytes, the index says")
        lost = [int(re.search(r"sample (\d+)", line)[1]) for line in lines[1:]]
        assert lost == list(range(first + 3, first + len(rows)))
        assert all(line.endswith("cut off") for line in lines[1:])
        assert found.key(first + 3) in lines[1]  # its header is still there


def test_deleted_shards_are_each_named(out, verify):
    (out / "shard-000000.tar").unlink()
    (out / "shard-000003.tar").unlink()
    code, lines, err = verify(out)
    assert code == 1 and [line.split("\t")[0] for line in lines] == ["shard-000000.tar", "shard-000003.tar"]
    assert all("missing" in line for line in lines) and "2 problems in 2 files" in err


def test_a_shard_that_the_index_does_not_know(out, verify):
    (out / "shard-000009.tar").write_bytes((out / "shard-000000.tar").read_bytes())
    code, lines, _ = verify(out)
    assert code == 1 and len(lines) == 1 and lines[0].startswith("shard-000009.tar\tnot in the index")


def rewrite_index(out, change):
    """Change the rows and make the index agree with them, as a wrong writer would."""
    meta = json.loads((out / "index.json").read_text())
    rows = np.load(out / "index.npy")
    change(rows, meta)
    body = io.BytesIO()
    np.save(body, rows)
    (out / "index.npy").write_bytes(body.getvalue())
    meta["rows_sha256"] = hashlib.sha256(body.getvalue()).hexdigest()
    (out / "index.json").write_text(json.dumps(meta))


def test_a_label_out_of_range_and_one_that_differs_from_cls(out, verify):
    def change(rows, meta):
        rows["label"][4] = 3
        rows["label"][10] = (rows["label"][10] + 1) % 3

    key = [ShardSet.open(out).key(i) for i in (4, 10)]
    rewrite_index(out, change)
    _, lines, _ = verify(out, "--quick")
    assert lines == [f"shard-000000.tar\tsample 4\t{key[0]}\tlabel 3 outside of the 3 classes"]
    code, lines, _ = verify(out)
    assert code == 1 and len(lines) == 3 and lines[0].endswith("outside of the 3 classes")
    assert lines[2] == f"shard-000001.tar\tsample 10\t{key[1]}\tits headers or label are not those of the index"


def test_an_image_that_does_not_decode_though_every_sum_agrees(out, verify):
    """A writer that copied a damaged image faithfully: only decoding tells."""
    found = ShardSet.open(out)
    row = next(r for r in found.rows if r["shard"] == 0)
    path = found.path(0)
    body = bytearray(path.read_bytes())
    body[int(row["offset"]) + 2 : int(row["offset"]) + int(row["size"])] = bytes(int(row["size"]) - 2)
    path.write_bytes(body)
    rewrite_index(out, lambda rows, meta: meta["shards"][0].update(sha256=hashlib.sha256(body).hexdigest()))
    (out / "sums.npy").unlink()
    code, lines, _ = verify(out)
    assert code == 1 and lines[0].startswith("sums.npy\tcannot be read")
    assert lines[1:] == [f"shard-000000.tar\tsample 0\t{found.key(0)}\tno JPEG and no PNG inside"]


@pytest.mark.parametrize("harm", ["npy", "json", "gone", "format"])
def test_a_damaged_index_is_one_sentence(out, refused, harm):
    if harm == "npy":
        flip(out / "index.npy", 200)
    elif harm == "json":
        (out / "index.json").write_text("{")
    elif harm == "gone":
        (out / "index.json").unlink()
    else:
        rewrite_index(out, lambda rows, meta: meta.update(format=99))
    assert str(out) in refused("verify", out)


def test_python_and_gnu_tar_agree_that_the_shards_are_whole(out):
    import subprocess

    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        listed = subprocess.run(["tar", "--quoting-style=literal", "-tf", path], capture_output=True, check=True)
        assert listed.stderr == b"" and listed.stdout.decode().splitlines() == names


def test_show_on_a_pipe_and_on_a_terminal(out, command, capsys):
    done = command("show", out)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and ["samples", "21"] in lines and ["class", "0", "cat", "10"] in lines
    assert sum(line[0] == "shard" for line in lines) == 4

    from rich.console import Console

    from data_prep.show import records, tables

    console = Console(width=150, record=True, file=io.StringIO())
    for table in tables(records(out), "out", at_most=2):
        console.print(table)
    text = console.export_text()
    assert "dog" in text and "yak" not in text and "and 1 more" in text
