"""What a batch holds depends on (seed, epoch, step): not on threads, ranks, or where the run began."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl import rng
from hpcssl.data import loader as module
from hpcssl.data.decode import decode
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order, Sequential
from hpcssl.data.reader import Reader
from hpcssl.errors import ConfigError, DataError, WorldError
from hpcssl.views.augment import NAMED, ViewSpec, draw

VIEWS = [ViewSpec(name="query", augment=NAMED["strong"], size=32),
         ViewSpec(name="target", augment=NAMED["byol_2"], size=24)]


def order(shards, batch=8, **options):
    return Order([s.samples for s in shards.shards], **{"seed": 1, "global_batch": batch, "window": 2} | options)


def load(shards, start, stop, *, rank=0, size=1, threads=1, limit=0, seed=1, views=VIEWS, ring=4):
    """Copies of the batches as plain lists."""
    reader = Reader(shards, limit=limit, seed=seed)
    with Loader(reader, order(shards), views, seed=seed, rank=rank, size=size, threads=threads, ring=ring) as loader:
        return [(b.step, b.epoch, b.index.copy(), b.label.copy(), [x.clone() for x in b.images],
                 [p.copy() for p in b.params]) for b in loader.run(start, stop)]


def assert_same(left, right):
    assert len(left) == len(right)
    for (*one, images, params), (*two, others, rows) in zip(left, right, strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)
        assert all(torch.equal(x, y) for x, y in zip(images, others, strict=True))
        for x, y in zip(params, rows, strict=True):
            assert x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def reference(shards):
    return load(shards, 0, 12)


@pytest.mark.parametrize("threads, ring", [(2, 3), (4, 4), (3, 7)])
def test_threads_and_ring_change_nothing(shards, reference, threads, ring):
    assert_same(load(shards, 0, 12, threads=threads, ring=ring), reference)


@pytest.mark.parametrize("start", [1, 5, 7, 11])
def test_a_run_can_begin_anywhere(shards, reference, start):
    assert_same(load(shards, start, 12, threads=2), reference[start:])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_hold_the_batch_of_one(shards, reference, size):
    parts = [load(shards, 3, 8, rank=rank, size=size, threads=2) for rank in range(size)]
    for step, whole in enumerate(reference[3:8]):
        ranks = [part[step] for part in parts]
        for field in (2, 3):
            np.testing.assert_array_equal(np.concatenate([r[field] for r in ranks]), whole[field])
        for view in range(2):
            assert torch.equal(torch.cat([r[4][view] for r in ranks]), whole[4][view])
            assert np.concatenate([r[5][view] for r in ranks]).tobytes() == whole[5][view].tobytes()


def test_against_the_slow_way(shards, reference):
    """One row recomputed by hand: order, label, address of the draw, crop of the decoded image."""
    step, epoch, index, label, images, params = reference[7]
    assert (step, epoch) == (7, 7 // 5)
    np.testing.assert_array_equal(index, order(shards).batch(7))
    np.testing.assert_array_equal(label, shards.labels[index])
    for row, sample in enumerate(index.tolist()):
        image = decode(Reader(shards).read(sample))
        for number, view in enumerate(VIEWS):
            drawn = draw(view.augment, rng.key(1, "view", epoch, sample, number), *image.shape[:2])
            assert drawn == params[number][row]
            top, left, height, width = drawn["box"]
            crop = torch.from_numpy(image[top:top + height, left:left + width].copy()).permute(2, 0, 1)[None]
            wanted = torch.nn.functional.interpolate(crop, (view.size, view.size), antialias=True,
                                                     mode=view.augment.interpolation, align_corners=False)
            assert torch.equal(images[number][row], wanted[0].permute(1, 2, 0))


def test_damaged_samples_are_replaced_alike_by_any_threads(tmp_path, make_shards, picture, encode):
    samples = [(f"{i}", b"" if i in (2, 11) else encode(picture(i)), i) for i in range(24)]
    shards = make_shards(tmp_path / "bad", samples)
    one, many = (load(shards, 0, 9, threads=t, limit=2) for t in (1, 4))
    assert_same(one, many)
    for _, _, index, label, _, _ in one:
        assert not {2, 11} & set(index.tolist())
        np.testing.assert_array_equal(label, index)  # the label came with the replacement
    reader = Reader(shards, limit=2, seed=1)
    with Loader(reader, order(shards), VIEWS, seed=1) as loader:
        list(loader.run(0, 3))
        assert [(i, key) for i, key, _ in loader.damaged] == [(2, "2"), (11, "11")]


def test_past_the_limit_the_consumer_gets_the_error(tmp_path, make_shards, picture, encode):
    samples = [(f"{i}", b"" if i % 5 == 0 else encode(picture(i)), i) for i in range(24)]
    shards = make_shards(tmp_path / "bad", samples)
    with pytest.raises(DataError, match="at most 2 damaged samples"):
        load(shards, 0, 3, threads=2, limit=2)
    assert workers() == []


def test_a_second_run_over_the_same_steps_is_filled_anew(shards):
    """What an earlier iterator left in the ring must not pass for a batch of this one."""
    reader, read = Reader(shards), []
    with Loader(reader, order(shards), VIEWS, seed=1, threads=2) as loader:
        first = [b.images[0].clone() for b in loader.run(0, 2)]
        for image in loader._slots[0].images + loader._slots[1].images:
            image.zero_()
        real = reader.images
        reader.images = lambda index, *a, **k: read.append(index) or real(index, *a, **k)
        for wanted, batch in zip(first, loader.run(0, 2), strict=True):
            assert torch.equal(batch.images[0], wanted)
    assert len(read) == 16


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("loader-")]


def test_an_error_in_a_thread_comes_out_whole_and_at_its_step(shards, monkeypatch):
    bad = int(order(shards).batch(2)[3])
    real = module.draw

    def fail(augment, key, height, width):
        if key == rng.key(1, "view", 0, bad, 1):
            raise ZeroDivisionError("from the thread")
        return real(augment, key, height, width)

    monkeypatch.setattr(module, "draw", fail)
    loader = Loader(Reader(shards), order(shards), VIEWS, seed=1, threads=2)
    steps = []
    with pytest.raises(ZeroDivisionError, match="from the thread") as caught:
        for batch in loader.run(0, 5):
            steps.append(batch.step)
    assert steps == [0, 1]
    assert any(entry.name == "_fill" for entry in caught.traceback)
    assert workers() == []


def test_threads_end_with_the_consumer(shards):
    loader = Loader(Reader(shards), order(shards), VIEWS, seed=1, threads=3)
    with pytest.raises(KeyError):
        for _ in loader.run(0, 100):
            assert len(workers()) == 3
            raise KeyError
    loader.close()
    assert workers() == []
    run = loader.run(0, 100)
    next(run)
    loader.close()
    assert workers() == []
    with pytest.raises(RuntimeError, match="closed"):
        next(run)
    assert [b.step for b in loader.run(4, 6)] == [4, 5]  # and it can be used again


def test_the_trainers_thread_count_is_its_own(shards):
    """The workers run torch with one thread each; the caller's count, and that of threads to come, stays."""
    before, seen, counts = torch.get_num_threads(), [], []
    torch.set_num_threads(3)
    try:
        reader = Reader(shards)
        real = reader.images
        reader.images = lambda *a, **k: seen.append(torch.get_num_threads()) or real(*a, **k)
        with Loader(reader, order(shards), VIEWS, seed=1, threads=2) as loader:
            for _ in loader.run(0, 2):
                assert torch.get_num_threads() == 3
                other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
                other.start()
                other.join()
        assert set(seen) == {1}
        assert counts == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_a_batch_stays_whole_while_it_is_the_consumers(shards):
    """The one in hand and the one before are never written, with the smallest ring and idle threads waiting."""
    with Loader(Reader(shards), order(shards), VIEWS, seed=1, threads=4, ring=3) as loader:
        previous = None
        for batch in loader.run(0, 15):
            if previous is not None:
                assert torch.equal(previous[0].images[0], previous[1])
            previous = batch, batch.images[0].clone()


def test_it_runs_ahead_and_no_further_than_the_ring(shards):
    reader, filled = Reader(shards), []
    real = reader.images
    reader.images = lambda index, *a, **k: filled.append(index) or real(index, *a, **k)
    with Loader(reader, order(shards), VIEWS, seed=1, threads=2, ring=4) as loader:
        run = loader.run(0, 50)
        next(run)
        wait = threading.Event()
        for _ in range(200):
            if len(filled) >= 4 * 8:
                break
            wait.wait(0.05)
        wait.wait(0.2)
        assert len(filled) == 4 * 8


def test_evaluation_order_with_a_short_last_batch(shards):
    view = [ViewSpec(name="eval", augment=NAMED["eval_whole"], size=32)]
    for size in (1, 3):
        index, labels = [], []
        for rank in range(size):
            with Loader(Reader(shards), Sequential(40, 16), view, seed=0, rank=rank, size=size) as loader:
                for batch in loader.run(0, 3):
                    assert len(batch.images[0]) == len(batch.index) == len(batch.params[0])
                    index += batch.index.tolist()
                    labels += batch.label.tolist()
        assert sorted(index) == list(range(40))
        assert labels == [i % 2 for i in index]


def test_second_modality_is_a_view(tmp_path, make_shards, picture, encode):
    shards = make_shards(tmp_path / "two", [(f"{i}", encode(picture(i)), 0, encode(picture(90 + i), "PNG"))
                                            for i in range(8)])
    whole = replace(NAMED["eval_whole"], zoom=1.0)
    views = [ViewSpec(name="a", augment=whole, size=32), ViewSpec(name="b", augment=whole, size=32, second=True)]
    with Loader(Reader(shards), Sequential(8, 8), views, seed=0) as loader:
        batch = next(loader.run(0, 1))
        swapped = make_shards(tmp_path / "one", [(f"{i}", encode(picture(90 + i), "PNG"), 0) for i in range(8)])
        with Loader(Reader(swapped), Sequential(8, 8), views[:1], seed=0) as other:
            assert torch.equal(batch.images[1], next(other.run(0, 1)).images[0])
        assert not torch.equal(batch.images[0], batch.images[1])


def test_mistakes(shards):
    with pytest.raises(WorldError, match="3 processes"):
        Loader(Reader(shards), order(shards), VIEWS, seed=0, size=3)
    with pytest.raises(ConfigError, match=r"data\.threads"):
        Loader(Reader(shards), order(shards), VIEWS, seed=0, threads=0)
    with pytest.raises(ConfigError, match=r"data\.ring"):
        Loader(Reader(shards), order(shards), VIEWS, seed=0, ring=2)


@pytest.mark.gpu
def test_pinned_batches_reach_the_device_whole(shards, reference):
    reader = Reader(shards, seed=1)
    with Loader(reader, order(shards), VIEWS, seed=1, threads=2, pin=True) as loader:
        copies = [batch.images[0].cuda(non_blocking=True) for batch in loader.run(0, 12)]
    torch.cuda.synchronize()
    for copy, (*_, images, _) in zip(copies, reference, strict=True):
        assert torch.equal(copy.cpu(), images[0])


def test_images_of_every_kind_draw_from_their_upright_size(tmp_path, make_shards, picture, encode):
    """Turned by EXIF, PNG, gray and plain in one chunk: the box is drawn for the image as it is cut."""
    exif = Image.Exif()
    exif[0x0112] = 6
    bodies = [encode(picture(0, 40, 90)), encode(picture(1, 40, 90), exif=exif), encode(picture(2, 70, 30), "PNG"),
              encode(Image.fromarray(picture(3, 50, 51)).convert("L"))] * 2
    shards = make_shards(tmp_path / "kinds", [(f"{i}", body, 0) for i, body in enumerate(bodies)])
    with Loader(Reader(shards), Sequential(8, 8), VIEWS, seed=5) as loader:
        batch = next(loader.run(0, 1))
        for row, shape in enumerate([(40, 90), (90, 40), (70, 30), (50, 51)] * 2):
            for number, view in enumerate(VIEWS):
                assert batch.params[number][row] == draw(view.augment, rng.key(5, "view", 0, row, number), *shape)
