"""Arrays of .npy files are read by many threads at the same time."""

import gc
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hpcssl.storage.npy import array_of, mapped_array


@pytest.fixture
def garbage_collector_that_yields():
    """Collect garbage often, and let another thread run each time: only there can a parser of Python code switch."""

    def let_others_run(phase, info):
        time.sleep(0)

    before = gc.get_threshold()
    gc.callbacks.append(let_others_run)
    gc.set_threshold(5)
    yield
    gc.set_threshold(*before)
    gc.callbacks.remove(let_others_run)


@pytest.mark.usefixtures("garbage_collector_that_yields")
def test_threads_read_headers_at_the_same_time(tmp_path):
    """Python 3.11.7 fails here when nothing keeps the threads apart."""
    rows = np.zeros(3, [("shard", "<u4"), ("header", "<u8"), ("label", "<i4")])
    rows["label"] = [4, 5, 6]
    content = io.BytesIO()
    np.save(content, rows)
    path = tmp_path / "rows.npy"
    path.write_bytes(content.getvalue())

    def read(number):
        return (mapped_array(path) if number % 2 else array_of(content.getvalue()))["label"].tolist()

    with ThreadPoolExecutor(8) as pool:
        assert set(map(tuple, pool.map(read, range(400)))) == {(4, 5, 6)}
