"""``hpcssl-shard verify`` names exactly what is damaged, and ``hpcssl-shard show`` lists a folder."""

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest

from data_prep.shards import reader
from hpcssl.data.shards import ShardSet
from tests.printed import numbers_in, printed_error


@pytest.fixture
def out(tree, tmp_path, run_shard):
    assert run_shard("images", tree, tmp_path / "out", "--samples-per-shard", 6, "--workers", 1) == 0
    return tmp_path / "out"


@pytest.fixture
def verify(run_shard, capsys):
    """verify(folder, options…) -> (exit code, lines of stdout, stderr)."""

    def run(out, *args):
        capsys.readouterr()
        code = run_shard("verify", out, "--workers", 1, *args)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run


def flip_bit(path, at, mask=1):
    body = bytearray(path.read_bytes())
    body[at] ^= mask
    path.write_bytes(body)


def test_an_undamaged_folder_gives_one_line(out, verify):
    for extra in ((), ("--quick",)):
        code, lines, err = verify(out, *extra)
        assert (code, len(lines), err) == (0, 1, "") and "21 samples of 3 classes in 4 shards" in lines[0]


def test_every_flipped_byte_is_found_and_attributed_to_its_sample(out, verify):
    """Bytes of a whole shard, one at a time: headers, image, padding, label, KEY.json, end mark."""
    shards = ShardSet.open(out)
    path = shards.path(1)
    whole = path.read_bytes()
    rows = shards.rows[shards.rows["shard"] == 1]
    edges = reader.sample_extents(rows, len(whole))
    first = int(np.flatnonzero(shards.rows["shard"] == 1)[0])
    for at in [*range(0, len(whole), 397), 600, 1025, len(whole) - 3]:
        flip_bit(path, at, 0x10)
        code, lines, err = verify(out)
        assert code == 1 and "shard-000001.tar" in printed_error(err).got
        assert lines[0].startswith("shard-000001.tar\t") and "sha256" in lines[0]
        assert len(lines) == 2, (at, lines)
        if at >= edges[-1]:
            assert lines[1].startswith("shard-000001.tar\t") and "end mark" in lines[1]
        else:
            damaged = int(np.searchsorted(edges, at, "right")) - 1
            assert f"\tsample {first + damaged}\t" in lines[1], (at, lines)
        path.write_bytes(whole)


def test_the_error_of_verify_is_one_line_and_its_output_names_the_sample(out, run_command):
    shards = ShardSet.open(out)
    row = shards.rows[8]
    flip_bit(shards.path(row["shard"]), int(row["offset"]) + int(row["size"]) // 2)
    done = run_command("verify", out)
    assert done.returncode == 1
    assert f"sample 8\t{shards.key(8)}\t" in done.stdout
    error = printed_error(done.stderr)
    assert error.what == f"shard folder {out}" and numbers_in(error.got)[:2] == [2, 1]  # problems and files
    assert done.stderr.count("\n") == 1 and error.fix


def test_the_samples_that_a_truncated_shard_lost_are_named(out, verify):
    shards = ShardSet.open(out)
    path, rows = shards.path(2), shards.rows[shards.rows["shard"] == 2]
    cut = int(rows["offset"][3]) + 10
    path.write_bytes(path.read_bytes()[:cut])
    first = int(np.flatnonzero(shards.rows["shard"] == 2)[0])
    for extra in ((), ("--quick",)):
        code, lines, _ = verify(out, *extra)
        assert code == 1 and lines[0].startswith(f"shard-000002.tar\t{cut} bytes")
        assert str(shards.shards[2].bytes) in lines[0]
        lost = [int(re.search(r"sample (\d+)", line)[1]) for line in lines[1:]]
        assert lost == list(range(first + 3, first + len(rows)))
        assert all("cut off" in line for line in lines[1:])
        assert shards.key(first + 3) in lines[1]  # its header is in the part that is left


def test_every_deleted_shard_is_named(out, verify):
    (out / "shard-000000.tar").unlink()
    (out / "shard-000003.tar").unlink()
    code, lines, err = verify(out)
    assert code == 1 and [line.split("\t")[0] for line in lines] == ["shard-000000.tar", "shard-000003.tar"]
    assert all("missing" in line for line in lines)
    assert numbers_in(printed_error(err).got)[:2] == [2, 2]  # problems and files


def test_a_shard_that_is_not_in_the_index_is_named(out, verify):
    (out / "shard-000009.tar").write_bytes((out / "shard-000000.tar").read_bytes())
    code, lines, _ = verify(out)
    assert code == 1 and len(lines) == 1 and lines[0].startswith("shard-000009.tar\tnot in the index")


def rewrite_index(out, change):
    """Change the rows and make the digests agree with them, as a faulty writer would."""
    meta = json.loads((out / "index.json").read_text())
    rows = np.load(out / "index.npy")
    change(rows, meta)
    body = io.BytesIO()
    np.save(body, rows)
    (out / "index.npy").write_bytes(body.getvalue())
    meta["rows_sha256"] = hashlib.sha256(body.getvalue()).hexdigest()
    (out / "index.json").write_text(json.dumps(meta))


def test_labels_out_of_range_or_different_from_cls_are_named(out, verify):
    def change(rows, meta):
        rows["label"][4] = 3
        rows["label"][10] = (rows["label"][10] + 1) % 3

    key = [ShardSet.open(out).key(i) for i in (4, 10)]
    rewrite_index(out, change)
    _, lines, _ = verify(out, "--quick")
    assert len(lines) == 1 and lines[0].startswith(f"shard-000000.tar\tsample 4\t{key[0]}\t")
    assert numbers_in(lines[0].split("\t")[-1]) == [3, 3]  # the label, and the number of classes
    code, all_lines, _ = verify(out)
    assert code == 1 and len(all_lines) == 3 and all_lines[0] == lines[0]
    assert all_lines[2].startswith(f"shard-000001.tar\tsample 10\t{key[1]}\t") and "label" in all_lines[2]


def test_an_image_that_cannot_be_decoded_is_named_although_all_digests_agree(out, verify):
    """As after a writer that copied a damaged image: only decoding can find it."""
    shards = ShardSet.open(out)
    row = next(r for r in shards.rows if r["shard"] == 0)
    path = shards.path(0)
    body = bytearray(path.read_bytes())
    body[int(row["offset"]) + 2 : int(row["offset"]) + int(row["size"])] = bytes(int(row["size"]) - 2)
    path.write_bytes(body)
    rewrite_index(out, lambda rows, meta: meta["shards"][0].update(sha256=hashlib.sha256(body).hexdigest()))
    (out / "sums.npy").unlink()
    code, lines, _ = verify(out)
    assert code == 1 and lines[0].startswith("sums.npy\t")
    assert len(lines) == 2 and lines[1].startswith(f"shard-000000.tar\tsample 0\t{shards.key(0)}\t")
    assert "JPEG" in lines[1]


@pytest.mark.parametrize(
    "damage, in_got",
    [("npy", "index.npy"), ("json", "JSONDecodeError"), ("removed", "index.json"), ("format", "99")],
)
def test_a_damaged_index_is_an_error(out, error_of, damage, in_got):
    if damage == "npy":
        flip_bit(out / "index.npy", 200)
    elif damage == "json":
        (out / "index.json").write_text("{")
    elif damage == "removed":
        (out / "index.json").unlink()
    else:
        rewrite_index(out, lambda rows, meta: meta.update(format=99))
    error = error_of("verify", out)
    assert error.what == f"shard folder {out}" and in_got in error.got


def test_tarfile_and_gnu_tar_list_the_same_members(out):
    import subprocess

    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        listed = subprocess.run(["tar", "--quoting-style=literal", "-tf", path], capture_output=True, check=True)
        assert listed.stderr == b"" and listed.stdout.decode().splitlines() == names


def test_show_on_a_pipe_and_on_a_terminal(out, run_command, capsys):
    done = run_command("show", out)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and ["samples", "21"] in lines and ["class", "0", "cat", "10"] in lines
    assert sum(line[0] == "shard" for line in lines) == 4

    from rich.console import Console

    from data_prep.show import make_tables, read_records

    console = Console(width=150, record=True, file=io.StringIO())
    for table in make_tables(read_records(out), "out", limit=2):
        console.print(table)
    text = console.export_text()
    assert "dog" in text and "yak" not in text and "and 1 more" in text
