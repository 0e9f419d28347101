"""Small copies of all transfer sets, in every published layout, through ``hpcssl-shard transfer --partial``."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.transfer import data_sets, hold_out
from data_prep.sources.transfer.layout import Item
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from tests.data_prep import miniatures
from tests.printed import numbers_in


@pytest.fixture
def make_set(tmp_path, encode_image):
    """make_set(maker, home="") writes a small copy of a set into tmp_path/src/home -> (its ``Maker``, its classes)."""

    def make(maker, home=""):
        m = miniatures.Maker(tmp_path / "src" / home, encode_image)
        return m, list(maker(m))

    return make


def read_parts(out):
    """(part -> key -> (label or targets, bytes), the shard sets of the three parts)."""
    samples = {}
    for part in data_sets.PARTS:
        shards = ShardSet.open(out / part)
        with Reader(shards) as reader:
            label = shards.labels.tolist() if shards.targets is None else shards.targets.tolist()
            samples[part] = {shards.key(i): (label[i], reader.read(i)) for i in range(len(shards))}
    return samples, [ShardSet.open(out / part) for part in data_sets.PARTS]


def run(run_shard, name, src, out, *extra):
    return run_shard("transfer", name, src, out, "--partial", "--workers", 1, *extra)


def test_every_set_has_a_small_copy():
    assert [maker.__name__ for maker in miniatures.MAKERS] == list(data_sets.DATA_SETS)


@pytest.mark.parametrize("maker", miniatures.MAKERS)
def test_parts_labels_and_images_equal_those_of_the_lists(maker, make_set, tmp_path, run_shard, content):
    name, facts = maker.__name__, data_sets.DATA_SETS[maker.__name__]
    home = facts.layouts[0].homes[-1] if facts.layouts[0].homes else ""
    m, classes = make_set(maker, home)
    assert run(run_shard, name, tmp_path / "src", tmp_path / "out") == 0
    samples, sets = read_parts(tmp_path / "out")
    assert (tmp_path / "out" / "trainval").is_dir() == (name == "voc07")
    if name == "voc07":
        both = ShardSet.open(tmp_path / "out" / "trainval")
        assert len(both) == len(sets[0]) + len(sets[1]) and both.classes == classes
        assert sorted(map(tuple, both.targets)) == sorted(map(tuple, [*sets[0].targets, *sets[1].targets]))
    for part, shards in zip(data_sets.PARTS, sets, strict=True):
        assert shards.classes == classes and shards.meta["dataset"] == name and shards.provenance["part"] == part
        assert (shards.targets is not None) == (name == "voc07") and shards.provenance["partial"] is True
    truth = {part: {source.rpartition(".")[0]: what for source, what in rows.items()} for part, rows in m.truth.items()}
    if name.startswith("cifar"):  # their images are pixels without files
        assert all(body[:4] == b"\x89PNG" for rows in samples.values() for _, body in rows.values())
        pixels = {
            key: np.asarray(Image.open(io.BytesIO(body)))
            for rows in samples.values()
            for key, (_, body) in rows.items()
        }
        assert all(np.array_equal(pixels[key], raw) for rows in truth.values() for key, (_, raw) in rows.items())
        truth = {part: {key: what[0] for key, what in rows.items()} for part, rows in truth.items()}
        samples = {part: {key: what[0] for key, what in rows.items()} for part, rows in samples.items()}
    if facts.val == "list":
        assert samples == truth and all(samples.values())
        return
    assert samples["val"] and not samples["val"].keys() & samples["train"].keys()
    if name == "caltech101":
        drawn = samples["train"] | samples["val"]
        assert np.bincount([label for label, _ in drawn.values()]).tolist() == [30, 30, 4]
        assert drawn | samples["test"] == truth["test"] and not drawn.keys() & samples["test"].keys()
    else:
        assert samples["train"] | samples["val"] == truth["train"] and samples["test"] == truth["test"]
    before = content(tmp_path / "out")  # a repaired folder has the same bytes
    (tmp_path / "out" / "val" / "shard-000000.tar").unlink()
    assert run(run_shard, name, tmp_path / "src", tmp_path / "out") == 0 and content(tmp_path / "out") == before


def test_sizes_add_up_to_those_on_the_web_pages():
    pages = {
        "food101": 101_000,
        "cifar10": 60_000,
        "cifar100": 60_000,
        "birdsnap": 49_829,
        "sun397": 39_700,
        "cars": 16_185,
        "aircraft": 10_000,
        "voc07": 9_963,
        "dtd": 5_640,
        "pets": 7_349,
        "caltech101": 9_144,
        "flowers": 8_189,
    }
    assert {name: sum(facts.sizes) for name, facts in data_sets.DATA_SETS.items()} == pages


@pytest.mark.parametrize(
    "name, counts",
    [
        ("pets", [93, 87, *[100] * 35]),
        ("caltech101", [30] * 102),
        ("sun397", [50] * 397),
        ("cars", [24, 68, *[42] * 98, *[41] * 96]),
        ("cifar100", [500] * 100),
    ],
)
def test_the_held_out_part_has_the_published_size_and_class_balance(name, counts):
    """Each class gives a fixed number or its share of images, which the seed draws."""
    facts = data_sets.DATA_SETS[name]
    assert len(counts) == facts.classes and sum(counts) == sum(facts.sizes[:2])
    items = [Item(f"{label}/{n}", "train", label) for label, count in enumerate(counts) for n in range(count)]
    held = {seed: hold_out.hold_out_val(items, facts, name, seed, True) for seed in (0, 1)}
    val = np.bincount([item.label for item in held[0] if item.part == "val"], minlength=len(counts))
    assert val.sum() == facts.sizes[1] and held[0] != held[1]
    assert [item._replace(part="train") for item in held[0]] == items
    if facts.val == "share":
        assert np.abs(val - np.array(counts) * (facts.sizes[1] / sum(counts))).max() < 1
    else:
        assert set(val.tolist()) == {facts.val}


def test_an_incomplete_set_is_refused_without_partial(make_set, tmp_path, error_of, run_shard):
    src, out = tmp_path / "src", tmp_path / "out"
    make_set(miniatures.dtd)
    error = error_of("transfer", "dtd", src, out)
    assert error.what == f"dtd in {src}" and "--partial" in error.fix
    assert numbers_in(error.got) == [3, 12, 9, 6]  # classes, train, val, test
    assert numbers_in(error.expected) == [47, 1880, 1880, 1880]
    for n in (1, 2, 5):
        next(src.glob(f"images/*/*_{n:04d}.jpg")).unlink()
    error = error_of("transfer", "dtd", src, out)
    assert numbers_in(error.got) == [3, 27] and "--partial" in error.fix  # 3 of 27 images are missing
    assert "(images/banded/banded_0001.jpg, images/banded/banded_0002.jpg, " in error.got
    assert not out.exists()
    assert run(run_shard, "dtd", src, out) == 0 and len(ShardSet.open(out / "train")) == 9
    for path in src.glob("images/*/*.jpg"):
        path.unlink()
    error = error_of("transfer", "dtd", src, tmp_path / "none", "--partial")
    assert numbers_in(error.got)[1:] == [0, 0, 0] and numbers_in(error.expected)[0] == 47


@pytest.mark.parametrize("smaller, expected", [({"classes": 2}, [2, 1880]), ({"sizes": (1880, 8, 1880)}, [47, 8])])
def test_a_folder_with_more_than_the_published_set_is_refused(
    make_set, tmp_path, error_of, monkeypatch, smaller, expected
):
    make_set(miniatures.dtd)
    monkeypatch.setitem(data_sets.DATA_SETS, "dtd", replace(data_sets.DATA_SETS["dtd"], **smaller))
    error = error_of("transfer", "dtd", tmp_path / "src", tmp_path / "out", "--partial")
    assert numbers_in(error.got) == [3, 12, 9, 6]
    assert numbers_in(error.expected)[0:3:2] == expected  # classes and val


def test_other_folders_sets_and_splits_are_refused(make_set, tmp_path, error_of):
    src, out = tmp_path / "src", tmp_path / "out"
    assert error_of("transfer", "pets", src, out).what == f"pets in {src}"
    make_set(miniatures.flowers)
    error = error_of("transfer", "pets", src, out)
    missing, _, present = error.got.partition("(")
    assert "images/, annotations/trainval.txt, annotations/test.txt" in missing
    assert "imagelabels.mat, jpg, setid.mat" in present and "robots.ox.ac.uk/~vgg/data/pets" in error.fix
    (src / "setid.mat").unlink()
    assert "setid.mat" in error_of("transfer", "flowers", src, out).got.partition("(")[0]
    error = error_of("transfer", "pets", src / "imagelabels.mat", out)
    assert error.what == f"pets in {src / 'imagelabels.mat'}" and error.got == "a file"
    error = error_of("transfer", "flower", src, out, code=2)
    assert error.got == "flower" and "'flowers'" in error.fix
    error = error_of("transfer", "flowers", src, out, "--split", 2, code=2)
    assert (error.what, error.got) == ("--split", "2") and "flowers" in error.expected
    error = error_of("transfer", "caltech101", src, out, "--split", 6, code=2)
    assert (error.what, error.got) == ("--split", "6") and numbers_in(error.expected) == [1, 5]
    error = error_of("transfer", "flowers", src, src / "out", code=2)
    assert error.what == f"OUT {src / 'out'}" and error.got.endswith(f"SRC {src}")
    assert not out.exists()


@pytest.mark.parametrize(
    "name, files",
    [
        ("cifar10", ["cifar-10-batches-py/data_batch_1"]),
        ("cifar100", ["cifar-100-python/train", "cifar-100-python/meta"]),
    ],
)
def test_pickles_are_refused(name, files, tmp_path, error_of):
    for file in files:
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / file).write_bytes(b"\x80\x04.")
    for src in (tmp_path / "src", (tmp_path / "src" / files[0]).parent):
        error = error_of("transfer", name, src, tmp_path / "out")
        assert error.what == f"{name} in {src}" and "pickle" in error.got and "-binary.tar.gz" in error.fix


def test_cifar_may_be_class_folders(tmp_path, encode_image, run_shard, caplog):
    m = miniatures.Maker(tmp_path / "src", encode_image)
    for part, label, n in m.each():
        m.image(f"{part}/{miniatures.SLUGS[label]}/{n:04d}.jpg", part, label)
    assert run(run_shard, "cifar10", tmp_path / "src", tmp_path / "out") == 0
    samples, sets = read_parts(tmp_path / "out")
    keyed = {
        part: {source.removesuffix(".jpg"): what for source, what in rows.items()} for part, rows in m.truth.items()
    }
    assert samples["train"] | samples["val"] == keyed["train"] and samples["test"] == keyed["test"]
    assert sets[0].classes == list(miniatures.SLUGS)
    assert any(str(tmp_path / "src") in message and "JPEG" in message for message in caplog.messages)  # lossy images


def test_cars_may_lie_in_one_folder(tmp_path, encode_image, run_shard):
    m, rows = miniatures.Maker(tmp_path / "src", encode_image), []
    for part, label, n in m.each():
        rows.append((f"car_ims/{n:06d}.jpg", label + 1, part == "test"))
        m.image(rows[-1][0], part, label)
    m.write(
        "cars_annos.mat",
        miniatures.mat(
            class_names=np.array(miniatures.CLASSES, object),
            annotations=np.array(rows, [("relative_im_path", object), ("class", np.uint8), ("test", np.uint8)]),
        ),
    )
    assert run(run_shard, "cars", tmp_path / "src", tmp_path / "out") == 0
    samples, sets = read_parts(tmp_path / "out")
    keyed = {
        part: {source.removesuffix(".jpg"): what for source, what in rows.items()} for part, rows in m.truth.items()
    }
    assert samples["train"] | samples["val"] == keyed["train"] and samples["test"] == keyed["test"]
    assert sets[0].classes == list(miniatures.CLASSES)


def test_damaged_lists_are_refused(make_set, tmp_path, error_of):
    src, out = tmp_path / "src", tmp_path / "out"
    ninth = np.array([("1.jpg", 9)], [("fname", object), ("class", np.uint8)])
    cases = (
        (miniatures.pets, "annotations/test.txt", "Bombay_1", "ValueError"),
        (miniatures.food101, "meta/test.json", '{"sushi": ["sushi/1"]}', "sushi"),
        (miniatures.food101, "meta/train.json", "{", "JSONDecodeError"),
        (miniatures.cars, "devkit/cars_train_annos.mat", "no matlab", "devkit/cars_train_annos.mat"),
        (miniatures.cars, "cars_test_annos_withlabels.mat", miniatures.mat(annotations=ninth), "cars_test/1.jpg"),
        (miniatures.cifar10, "data_batch_2.bin", b"cut", "data_batch_2.bin"),
        (miniatures.aircraft, "images_variant_val.txt", "1 unknown", "'unknown'"),
        (miniatures.voc07, "ImageSets/Main/bird_val.txt", "1 1", "'000013'"),
        (miniatures.voc07, "ImageSets/Main/bird_val.txt", "000013 5", "'000014'"),
        (miniatures.dtd, "labels/val1.txt", "../../secret.jpg", "../../secret.jpg"),
    )
    for number, (maker, file, content, in_got) in enumerate(cases):
        m, _ = make_set(maker, str(number))
        m.write(file, content)
        error = error_of("transfer", maker.__name__, src / str(number), out, "--partial")
        assert error.what == f"lists of {maker.__name__} in {src / str(number)}" and in_got in error.got
    m, _ = make_set(miniatures.dtd, "twice")
    m.write("labels/test1.txt", (m.home / "labels/train1.txt").read_text())
    error = error_of("transfer", "dtd", m.home, out, "--partial")
    assert str(m.home) in error.what and error.got == "images/banded/banded_0001.jpg twice"
    assert not out.exists()


def test_images_of_another_format_are_stored_as_png(make_set, tmp_path, encode_image, run_shard, error_of, caplog):
    """Oxford's pets hold GIFs and BMPs that are named .jpg."""
    m, _ = make_set(miniatures.pets)
    gif, bmp = "images/Bombay_7.jpg", "images/Bombay_8.jpg"
    m.write(gif, encode_image(7, "GIF", side=8, mode="P"))
    m.write(bmp, encode_image(8, "BMP", side=8))
    assert run(run_shard, "pets", tmp_path / "src", tmp_path / "out") == 0
    (message,) = (message for message in caplog.messages if f"{gif}, {bmp}" in message)
    assert numbers_in(message)[0] == 2
    samples, _ = read_parts(tmp_path / "out")
    rows = samples["train"] | samples["val"]
    for name in (gif, bmp):
        kept = Image.open(io.BytesIO(rows[name.removesuffix(".jpg")][1]))
        assert kept.format == "PNG"
        assert np.array_equal(np.asarray(kept), np.asarray(Image.open(m.home / name).convert("RGB")))
    m.write(gif, b"GIF89a and then nothing")
    m.write("images/Abyssinian_1.jpg", encode_image(1, side=64)[:500])
    error = error_of("transfer", "pets", tmp_path / "src", tmp_path / "two", "--partial", "--skip-bad", 0)
    assert numbers_in(error.got)[0] == 2 and "--skip-bad 2" in error.fix
    assert f"{gif}: " in error.got and "images/Abyssinian_1.jpg: " in error.got
    assert run(run_shard, "pets", tmp_path / "src", tmp_path / "two", "--skip-bad", 2) == 0


def test_splits_of_a_set_differ_and_are_not_mixed_in_one_folder(make_set, tmp_path, run_shard, error_of):
    make_set(miniatures.caltech101)
    for split in (1, 2):
        assert run(run_shard, "caltech101", tmp_path / "src", tmp_path / str(split), "--split", split) == 0
    (one, sets), (two, _) = read_parts(tmp_path / "1"), read_parts(tmp_path / "2")
    assert one["test"].keys() != two["test"].keys() and len(one["test"]) == len(two["test"])
    assert sets[0].provenance["split"] == 1
    options = ("--split", 2, "--partial")
    error = error_of("transfer", "caltech101", tmp_path / "src", tmp_path / "1", *options, "--workers", 1)
    assert str(tmp_path / "1") in error.what and "split was 1 and is 2" in error.got
    make_set(miniatures.dtd, "textures")
    error = error_of("transfer", "dtd", tmp_path / "src" / "textures", tmp_path / "out", *options)
    assert "labels/train2.txt, labels/val2.txt" in error.got
