"""The content of a batch depends on (seed, epoch, step) alone: not on threads, ranks or the first step of the run."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl import rng
from hpcssl.data import workers
from hpcssl.data.decode import decode
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order, SequentialOrder
from hpcssl.data.reader import Reader
from hpcssl.errors import ConfigError, DataError, WorldError
from hpcssl.views.augment import AUGMENTATIONS, ViewSpec, draw_params
from tests.printed import numbers_in
from tests.waiting import wait_until

VIEWS = [
    ViewSpec(name="query", augment=AUGMENTATIONS["strong"], size=32),
    ViewSpec(name="target", augment=AUGMENTATIONS["byol_oss_2"], size=24),
]


def order(shards, batch=8, **options):
    return Order([s.samples for s in shards.shards], **{"seed": 1, "global_batch": batch, "window": 2} | options)


def load(shards, start, stop, *, rank=0, size=1, threads=1, limit=0, seed=1, views=VIEWS, ring=4):
    """Copies of the batches as plain lists."""
    reader = Reader(shards, limit=limit, seed=seed)
    with Loader(reader, order(shards), views, seed=seed, rank=rank, size=size, threads=threads, ring=ring) as loader:
        return [
            (
                b.step,
                b.epoch,
                b.index.copy(),
                b.label.copy(),
                [x.clone() for x in b.images],
                [p.copy() for p in b.params],
            )
            for b in loader.iterate(start, stop)
        ]


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
def test_batches_do_not_depend_on_threads_or_ring_size(shards, reference, threads, ring):
    assert_same(load(shards, 0, 12, threads=threads, ring=ring), reference)


@pytest.mark.parametrize("start", [1, 5, 7, 11])
def test_batches_do_not_depend_on_the_first_step(shards, reference, start):
    assert_same(load(shards, start, 12, threads=2), reference[start:])


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_batches_together_equal_the_batch_of_one_process(shards, reference, size):
    parts = [load(shards, 3, 8, rank=rank, size=size, threads=2) for rank in range(size)]
    for step, whole in enumerate(reference[3:8]):
        ranks = [part[step] for part in parts]
        for field in (2, 3):
            np.testing.assert_array_equal(np.concatenate([r[field] for r in ranks]), whole[field])
        for view in range(2):
            assert torch.equal(torch.cat([r[4][view] for r in ranks]), whole[4][view])
            assert np.concatenate([r[5][view] for r in ranks]).tobytes() == whole[5][view].tobytes()


def test_a_batch_equals_a_literal_computation(shards, reference):
    """Every row is recomputed step by step: order, label, random key, crop of the decoded image."""
    step, epoch, index, label, images, params = reference[7]
    assert (step, epoch) == (7, 7 // 5)
    np.testing.assert_array_equal(index, order(shards).batch(7))
    np.testing.assert_array_equal(label, shards.labels[index])
    for row, sample in enumerate(index.tolist()):
        image = decode(Reader(shards).read(sample))
        for number, view in enumerate(VIEWS):
            drawn = draw_params(view.augment, rng.key(1, "view", epoch, sample, number), *image.shape[:2])
            assert drawn == params[number][row]
            top, left, height, width = drawn["box"]
            crop = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
            wanted = torch.nn.functional.interpolate(
                crop, (view.size, view.size), antialias=True, mode=view.augment.interpolation, align_corners=False
            )
            assert torch.equal(images[number][row], wanted[0].permute(1, 2, 0))


def test_damaged_samples_get_the_same_replacement_with_any_number_of_threads(tmp_path, make_shards, picture, encode):
    samples = [(f"{i}", b"" if i in (2, 11) else encode(picture(i)), i) for i in range(24)]
    shards = make_shards(tmp_path / "bad", samples)
    one, many = (load(shards, 0, 9, threads=t, limit=2) for t in (1, 4))
    assert_same(one, many)
    for _, _, index, label, _, _ in one:
        assert not {2, 11} & set(index.tolist())
        np.testing.assert_array_equal(label, index)  # the label came with the replacement
    reader = Reader(shards, limit=2, seed=1)
    with Loader(reader, order(shards), VIEWS, seed=1) as loader:
        list(loader.iterate(0, 3))
        assert [(i, key) for i, key, _ in loader.damaged] == [(2, "2"), (11, "11")]


def test_too_many_damaged_samples_are_an_error_in_the_consumer(tmp_path, make_shards, picture, encode):
    samples = [(f"{i}", b"" if i % 5 == 0 else encode(picture(i)), i) for i in range(24)]
    shards = make_shards(tmp_path / "bad", samples)
    with pytest.raises(DataError) as caught:
        load(shards, 0, 3, threads=2, limit=2)
    assert caught.value.what == f"samples of {shards.root}" and numbers_in(caught.value.expected) == [2]
    # the third one is too many; the other thread may have met one or both of the other two by then
    assert 3 <= numbers_in(caught.value.got)[0] <= 5
    assert worker_threads() == []


def test_a_second_pass_over_the_same_steps_fills_its_batches_again(shards):
    """A batch that an earlier pass left in the ring must not be taken for one of this pass."""
    reader, read = Reader(shards), []
    with Loader(reader, order(shards), VIEWS, seed=1, threads=2) as loader:
        first = [b.images[0].clone() for b in loader.iterate(0, 2)]
        for image in loader._slots[0].images + loader._slots[1].images:
            image.zero_()
        real = reader.read
        reader.read = lambda index, *a, **k: read.append(index) or real(index, *a, **k)
        for wanted, batch in zip(first, loader.iterate(0, 2), strict=True):
            assert torch.equal(batch.images[0], wanted)
    assert len(read) == 16


def worker_threads():
    return [t for t in threading.enumerate() if t.name.startswith("loader-")]


def test_an_error_in_a_thread_is_raised_at_its_step_with_its_traceback(shards, monkeypatch):
    bad = int(order(shards).batch(2)[3])
    real = workers.draw_params

    def fail(augment, key, height, width):
        if key == rng.key(1, "view", 0, bad, 1):
            raise ZeroDivisionError("from the thread")
        return real(augment, key, height, width)

    monkeypatch.setattr(workers, "draw_params", fail)
    loader = Loader(Reader(shards), order(shards), VIEWS, seed=1, threads=2)
    steps = []
    with pytest.raises(ZeroDivisionError, match="from the thread") as caught:
        for batch in loader.iterate(0, 5):
            steps.append(batch.step)
    assert steps == [0, 1]
    assert any(entry.name == "_fill" for entry in caught.traceback)
    assert worker_threads() == []


def test_threads_end_when_the_consumer_raises_or_closes(shards):
    loader = Loader(Reader(shards), order(shards), VIEWS, seed=1, threads=3)
    with pytest.raises(KeyError):
        for _ in loader.iterate(0, 100):
            assert len(worker_threads()) == 3
            raise KeyError
    loader.close()
    assert worker_threads() == []
    iterator = loader.iterate(0, 100)
    next(iterator)
    loader.close()
    assert worker_threads() == []
    with pytest.raises(RuntimeError):
        next(iterator)
    assert [b.step for b in loader.iterate(4, 6)] == [4, 5]  # it can be used again


def test_workers_do_not_change_the_number_of_torch_threads_of_the_caller(shards):
    """Each worker runs torch with one thread. The numbers of the caller and of later threads stay as they were."""
    before, seen, counts = torch.get_num_threads(), [], []
    torch.set_num_threads(3)
    try:
        reader = Reader(shards)
        real = reader.read
        reader.read = lambda *a, **k: seen.append(torch.get_num_threads()) or real(*a, **k)
        with Loader(reader, order(shards), VIEWS, seed=1, threads=2) as loader:
            for _ in loader.iterate(0, 2):
                assert torch.get_num_threads() == 3
                other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
                other.start()
                other.join()
        assert set(seen) == {1}
        assert counts == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_the_current_and_the_previous_batch_are_never_overwritten(shards):
    """Even with the smallest ring, while idle threads wait for memory."""
    with Loader(Reader(shards), order(shards), VIEWS, seed=1, threads=4, ring=3) as loader:
        previous = None
        for batch in loader.iterate(0, 15):
            if previous is not None:
                assert torch.equal(previous[0].images[0], previous[1])
            previous = batch, batch.images[0].clone()


def test_the_loader_fills_the_ring_ahead_and_not_more(shards):
    reader, filled = Reader(shards), []
    real = reader.read
    reader.read = lambda index, *a, **k: filled.append(index) or real(index, *a, **k)
    with Loader(reader, order(shards), VIEWS, seed=1, threads=2, ring=4) as loader:
        iterator = loader.iterate(0, 50)
        next(iterator)
        # both threads wait for a notification, so nothing more is filled, however long the test waits
        idle = loader._workers._condition._waiters
        wait_until(lambda: len(idle) == 2, lambda: f"idle threads: {len(filled)} rows filled")
        assert len(filled) == 4 * 8


def test_sequential_order_with_a_short_last_batch(shards):
    view = [ViewSpec(name="eval", augment=AUGMENTATIONS["eval_whole"], size=32)]
    for size in (1, 3):
        index, labels = [], []
        for rank in range(size):
            with Loader(Reader(shards), SequentialOrder(40, 16), view, seed=0, rank=rank, size=size) as loader:
                for batch in loader.iterate(0, 3):
                    assert len(batch.images[0]) == len(batch.index) == len(batch.params[0])
                    index += batch.index.tolist()
                    labels += batch.label.tolist()
        assert sorted(index) == list(range(40))
        assert labels == [i % 2 for i in index]


def test_the_second_modality_is_a_view(tmp_path, make_shards, picture, encode):
    shards = make_shards(
        tmp_path / "two", [(f"{i}", encode(picture(i)), 0, encode(picture(90 + i), "PNG")) for i in range(8)]
    )
    whole = replace(AUGMENTATIONS["eval_whole"], zoom=1.0)
    views = [ViewSpec(name="a", augment=whole, size=32), ViewSpec(name="b", augment=whole, size=32, second=True)]
    with Loader(Reader(shards), SequentialOrder(8, 8), views, seed=0) as loader:
        batch = next(loader.iterate(0, 1))
        swapped = make_shards(tmp_path / "one", [(f"{i}", encode(picture(90 + i), "PNG"), 0) for i in range(8)])
        with Loader(Reader(swapped), SequentialOrder(8, 8), views[:1], seed=0) as other:
            assert torch.equal(batch.images[1], next(other.iterate(0, 1)).images[0])
        assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("options, key, value", [({"threads": 0}, "data.threads", 0), ({"ring": 2}, "data.ring", 2)])
def test_too_few_threads_or_batches_are_refused(shards, options, key, value):
    with pytest.raises(ConfigError) as caught:
        Loader(Reader(shards), order(shards), VIEWS, seed=0, **options)
    assert caught.value.what == key and numbers_in(caught.value.got) == [value]


def test_a_world_size_that_does_not_divide_the_batch_is_refused(shards):
    with pytest.raises(WorldError) as caught:
        Loader(Reader(shards), order(shards), VIEWS, seed=0, size=3)
    assert numbers_in(caught.value.what) == [8] and numbers_in(caught.value.got) == [3]


class LateDevice:
    """A device whose copies run as late as they may: once an event behind them is waited for, or at the end.

    ``event`` stands in for the class ``torch.cuda.Event``.

    Attributes:
        loses_events: Whether events wait for nothing.
    """

    def __init__(self, loses_events=False):
        self.lock, self.queue, self.results, self.loses_events = threading.Lock(), [], [], loses_events

    def copy(self, source):
        with self.lock:
            self.queue.append(source)

    def run_until(self, count):
        with self.lock:
            while len(self.results) < min(count, len(self.queue)):
                self.results.append(self.queue[len(self.results)].clone())

    def event(self, *, blocking):
        device = self

        class Event:
            device = -1  # none, for torch.cuda.device

            def record(self):
                self.behind = len(device.queue)

            def synchronize(self):
                device.run_until(0 if device.loses_events else self.behind)

        return Event()


@pytest.fixture
def late_device(monkeypatch):
    """Make pinned memory and events those of a ``LateDevice``."""
    device, zeros = LateDevice(), torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **options: zeros(*a, **options))
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    return device


@pytest.mark.parametrize("loses_events", [False, True])
@pytest.mark.parametrize("threads, ring", [(1, 3), (3, 4)])
def test_memory_is_not_overwritten_before_a_late_copy(shards, reference, late_device, threads, ring, loses_events):
    """The consumer queues copies and never waits, as in the scoring of fine-tuning; two passes share the memory."""
    late_device.loses_events = loses_events
    reader = Reader(shards, seed=1)
    with Loader(reader, order(shards), VIEWS, seed=1, threads=threads, ring=ring, pin=True) as loader:
        for start, stop in ((0, 8), (3, 12)):
            for batch in loader.iterate(start, stop):
                for image in batch.images:
                    late_device.copy(image)
    late_device.run_until(len(late_device.queue))
    expected = [image for part in (reference[:8], reference[3:12]) for *_, images, _ in part for image in images]
    assert len(late_device.results) == len(expected)
    equal = [torch.equal(copy, image) for copy, image in zip(late_device.results, expected, strict=True)]
    # without the wait the simulation shows the error: only what still lies in the ring is right
    assert sum(equal) <= 2 * ring if loses_events else all(equal)


def test_a_batch_may_be_copied_while_the_next_one_is_there(shards, reference, late_device):
    """The batch before the current one still belongs to the consumer, and so do copies that it queues then."""
    with Loader(Reader(shards, seed=1), order(shards), VIEWS, seed=1, threads=2, ring=3, pin=True) as loader:
        previous = None
        for batch in loader.iterate(0, 12):
            if previous is not None:
                late_device.copy(previous.images[0])
            previous = batch
        late_device.copy(previous.images[0])
        late_device.run_until(12)
    for copy, (*_, images, _) in zip(late_device.results, reference, strict=True):
        assert torch.equal(copy, images[0])


def test_an_error_of_the_device_is_raised_in_the_consumer(shards, late_device, monkeypatch):
    def fail(count):
        raise RuntimeError("device error")

    monkeypatch.setattr(late_device, "run_until", fail)
    loader = Loader(Reader(shards), order(shards), VIEWS, seed=1, threads=2, ring=3, pin=True)
    with pytest.raises(RuntimeError, match="device error"):
        list(loader.iterate(0, 12))
    assert worker_threads() == []


@pytest.mark.gpu
def test_pinned_batches_are_copied_correctly_to_the_device(shards, reference):
    """Work that is queued in front of each copy makes it late."""
    reader = Reader(shards, seed=1)
    copies = []
    with Loader(reader, order(shards), VIEWS, seed=1, threads=2, pin=True) as loader:
        for batch in loader.iterate(0, 12):
            torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
            copies.append(batch.images[0].cuda(non_blocking=True))
    torch.cuda.synchronize()
    for copy, (*_, images, _) in zip(copies, reference, strict=True):
        assert torch.equal(copy.cpu(), images[0])


def test_crops_are_drawn_for_the_size_of_the_upright_image(tmp_path, make_shards, picture, encode):
    """JPEGs with and without EXIF rotation, PNG and gray images in one chunk: the box fits the decoded image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    bodies = [
        encode(picture(0, 40, 90)),
        encode(picture(1, 40, 90), exif=exif),
        encode(picture(2, 70, 30), "PNG"),
        encode(Image.fromarray(picture(3, 50, 51)).convert("L")),
    ] * 2
    shards = make_shards(tmp_path / "kinds", [(f"{i}", body, 0) for i, body in enumerate(bodies)])
    with Loader(Reader(shards), SequentialOrder(8, 8), VIEWS, seed=5) as loader:
        batch = next(loader.iterate(0, 1))
        for row, shape in enumerate([(40, 90), (90, 40), (70, 30), (50, 51)] * 2):
            for number, view in enumerate(VIEWS):
                assert batch.params[number][row] == draw_params(
                    view.augment, rng.key(5, "view", 0, row, number), *shape
                )
