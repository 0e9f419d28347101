"""Tar headers of any name and size are read by Python's tarfile."""

import io
import tarfile

import pytest

from data_prep.shards import ustar


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "x" * 100,
        "d" * 60 + "/" + "x" * 60,
        "d" * 155 + "/" + "x" * 100,
        "d" * 156 + "/" + "x" * 100,
        "x" * 101,
        "a/" * 140 + "end.jpg",
        "ü" * 49 + ".j",
        "ü" * 60,
        "folder/" + "日" * 90 + ".jpg",
        b"caf\xe9.jpg".decode("utf-8", "surrogateescape"),
        (b"\xff" * 300).decode("utf-8", "surrogateescape"),
    ],
)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 100_000])
def test_tarfile_reads_the_name_and_the_size(name, size):
    body = b"z" * size
    archive = ustar.make_header(name, size) + body + bytes(ustar.padded_size(size) - size) + ustar.END
    assert len(archive) % 512 == 0 and len(ustar.make_header(name, size)) == ustar.header_size(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (info,) = tar.getmembers()
        assert (info.name, info.size, info.mtime, info.uid, info.gid, info.uname) == (name, size, 0, 0, 0, "")
        assert tar.extractfile(info).read() == body


def test_the_length_of_a_pax_record_includes_its_own_digits():
    for n in range(256, 1200, 7):  # crosses the points where the length gains a digit
        with tarfile.open(fileobj=io.BytesIO(ustar.make_header("n" * n, 0) + ustar.END)) as tar:
            assert tar.getnames() == ["n" * n]
