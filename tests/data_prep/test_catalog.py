"""Catalogs: rows in typed columns are the same rows, in the order and with the keys that plain Python gives."""

import io
import random
import tracemalloc
from collections import namedtuple

import numpy as np
import pytest

from data_prep import index
from data_prep.catalog import Sample, SampleTable, SourceFile, SourceListing, make_catalog, sort_samples
from data_prep.catalog.compact import CompactRows, IntColumn, SharedColumn, TextColumn
from data_prep.catalog.names import sample_key
from data_prep.jobs import make_jobs
from hpcssl.errors import DataError

ALPHABET = ["a", "b", "Z", ".", "/", "é", "\udcff", "\U0001f600", "\x00"]


def sort_plainly(names):
    """Sort with Python's own strings: which of the keys keep the suffix."""
    keys, result = {}, []
    for name in sorted(names):
        for keep_suffix in (False, True):
            key = sample_key(name, keep_suffix=keep_suffix).casefold()
            if keys.setdefault(key, name) is name:
                result.append((name, keep_suffix))
                break
            if keys[key] == name or keep_suffix:
                raise DataError("names", got=name, expected="", fix="")
    return result


@pytest.mark.parametrize("seed", range(20))
def test_texts_sort_like_strings(seed):
    draw = random.Random(seed)
    prefix = "".join(draw.choices(ALPHABET, k=draw.randrange(20)))
    texts = [prefix + "".join(draw.choices(ALPHABET, k=draw.randrange(12))) for _ in range(300)]
    column = TextColumn()
    for text in texts:
        column.append(text)
    assert [column[row] for row in range(len(texts))] == texts
    assert column.argsort().tolist() == sorted(range(len(texts)), key=texts.__getitem__)


def test_an_empty_column_has_an_empty_order():
    assert TextColumn().argsort().tolist() == []


def make_samples(names):
    return [Sample(name, n, "folder", n << 33, n, -n) for n, name in enumerate(names)]


@pytest.mark.parametrize("seed", range(40))
def test_the_same_keys_keep_their_suffix_and_the_same_names_clash(seed):
    draw = random.Random(seed)
    names = ["".join(draw.choices(["a", "A", "b", ".png", ".jpg", "/"], k=draw.randrange(2, 5))) for _ in range(12)]
    names += ["x.jpg", "x.png", "x.png.jpg", "x.png.jpg.jpg"] * draw.randrange(2)  # each takes the key of the next one
    names = list(dict.fromkeys(names)) if draw.random() < 0.8 else names
    try:
        expected = sort_plainly(names)
    except DataError:
        with pytest.raises(DataError, match="names in the source"):
            sort_samples(SampleTable(make_samples(names)), "the source")
    else:
        table = sort_samples(SampleTable(make_samples(names)), "the source")
        assert [(sample.source, sample.key_suffix) for sample in table] == expected
        assert {sample.source: sample.label for sample in table} == {name: n for n, name in enumerate(names)}


def test_a_catalog_of_a_listing_is_sorted_and_keeps_every_field():
    listing = SourceListing("origin", "archive.tar")
    for n, name in enumerate(("b/2.png", "b/2.jpg", "a/1.jpg")):
        listing.images.append(SourceFile(name, 512 * n, 10**10 + n, n))
    catalog = make_catalog(listing, ["a", "b"], [1, 1, 0])
    assert list(catalog.samples) == [
        Sample("a/1.jpg", 0, "archive.tar", 1024, 10**10 + 2, 2),
        Sample("b/2.jpg", 1, "archive.tar", 512, 10**10 + 1, 1),
        Sample("b/2.png", 1, "archive.tar", 0, 10**10, 0, key_suffix=True),
    ]
    assert catalog.samples[-1] == catalog.samples[2] and catalog.samples[1:] == list(catalog.samples)[1:]
    with pytest.raises(IndexError):
        catalog.samples[3]


def test_every_field_of_a_sample_comes_back():
    samples = [
        Sample("a", -1, "p", -1, 0, 2**62),
        Sample("b", 7, "q", 2**40, 5, -1, second=(3, 4), original_label=2, extra_json="{}", key_suffix=True),
        Sample("c", 7, "p", 0, 5, 0, second=b"edges"),
    ]
    assert list(SampleTable(samples)) == samples


def test_a_time_beyond_64_bits_is_kept_as_the_largest():
    table = SampleTable([Sample("a", 0, "p", 0, 1, 10**20)])
    assert table[0].mtime_ns == 2**63 - 1


def test_rows_with_a_missing_field_are_refused():
    pair = namedtuple("pair", "a b")
    table = CompactRows(pair._make, [IntColumn(), SharedColumn()], [])
    with pytest.raises(ValueError, match="shorter"):
        table.append((1,))


def test_a_catalog_and_its_shards_take_less_than_300_bytes_an_image():
    count = 50_000
    listing = SourceListing("origin", "folder")
    tracemalloc.start()
    try:
        for n in range(count):
            listing.images.append(SourceFile(f"n{n % 1000:08d}/n{n % 1000:08d}_{n}.JPEG", -1, 110_000, n))
        catalog = make_catalog(listing, ["a"], [0] * count)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 200 * count and peak < 300 * count  # tuples of Python objects took 500 and more
    assert len(catalog.samples) == count


def test_the_jobs_hold_every_sample_once(tmp_path):
    listing = SourceListing("origin", "folder")
    for n in range(23):
        listing.images.append(SourceFile(f"{n}.jpg", -1, n, 0))
    jobs = make_jobs(tmp_path, make_catalog(listing, [], [-1] * 23), 5, 0, 1, None)
    assert len(jobs) == 5 and jobs.sizes == [5, 5, 5, 5, 3]
    assert [len(job.samples) for job in jobs] == jobs.sizes and [job.name for job in jobs] == jobs.names
    assert sorted(sample.source for job in jobs for sample in job.samples) == sorted(f"{n}.jpg" for n in range(23))
    assert jobs[-1] == jobs[4] == jobs[4:][0]


@pytest.mark.parametrize(
    "parts", [[np.arange(6, dtype=np.int8).reshape(2, 3)], [np.zeros(3, "<u8"), np.ones(0, "<u8")]]
)
def test_an_array_written_in_parts_is_the_file_of_numpy(tmp_path, parts):
    expected = io.BytesIO()
    np.save(expected, np.concatenate(parts), allow_pickle=False)
    digest = index.write_array(tmp_path / "array.npy", parts)
    assert (tmp_path / "array.npy").read_bytes() == expected.getvalue()
    assert len(digest) == 64
