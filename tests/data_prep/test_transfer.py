"""Every published layout of the transfer sets, in miniature, through ``hpcssl-shard transfer --partial``."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import transfer
from data_prep.layouts import Item
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet

spec = importlib.util.spec_from_file_location("miniatures", Path(__file__).with_name("miniatures.py"))
mini = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mini)


@pytest.fixture
def made(tmp_path, picture):
    """Write the miniature of a set into tmp_path/src; returns its maker and its classes."""

    def make(maker, home=""):
        m = mini.Maker(tmp_path / "src" / home, picture)
        return m, list(maker(m))

    return make


def parts_of(out):
    """part -> source -> (label or targets, bytes), with the classes of all three."""
    found = {}
    for part in transfer.PARTS:
        shards = ShardSet.open(out / part)
        with Reader(shards) as reader:
            label = shards.labels.tolist() if shards.targets is None else shards.targets.tolist()
            found[part] = {shards.key(i): (label[i], reader.read(i)) for i in range(len(shards))}
    return found, [ShardSet.open(out / part) for part in transfer.PARTS]


def run(shard, name, src, out, *extra):
    return shard("transfer", name, src, out, "--partial", "--workers", 1, *extra)


def test_all_twelve_are_tested():
    assert [maker.__name__ for maker in mini.MAKERS] == list(transfer.SETS)


@pytest.mark.parametrize("maker", mini.MAKERS)
def test_layout(maker, made, tmp_path, shard, content):
    name, facts = maker.__name__, transfer.SETS[maker.__name__]
    home = facts.layouts[0].homes[-1] if facts.layouts[0].homes else ""
    m, classes = made(maker, home)
    assert run(shard, name, tmp_path / "src", tmp_path / "out") == 0
    found, sets = parts_of(tmp_path / "out")
    assert (tmp_path / "out" / "trainval").is_dir() == (name == "voc07")
    if name == "voc07":
        both = ShardSet.open(tmp_path / "out" / "trainval")
        assert len(both) == len(sets[0]) + len(sets[1]) and both.classes == classes
        assert sorted(map(tuple, both.targets)) == sorted(map(tuple, [*sets[0].targets, *sets[1].targets]))
    for part, shards in zip(transfer.PARTS, sets, strict=True):
        assert shards.classes == classes and shards.meta["dataset"] == name and shards.made["part"] == part
        assert (shards.targets is not None) == (name == "voc07") and shards.made["partial"] is True
    truth = {part: {source.rpartition(".")[0]: what for source, what in rows.items()} for part, rows in m.truth.items()}
    if name.startswith("cifar"):  # the one set of pixels without files
        assert all(body[:4] == b"\x89PNG" for rows in found.values() for _, body in rows.values())
        pixels = {key: np.asarray(Image.open(io.BytesIO(body))) for rows in found.values()
                  for key, (_, body) in rows.items()}
        assert all(np.array_equal(pixels[key], raw) for rows in truth.values() for key, (_, raw) in rows.items())
        truth = {part: {key: what[0] for key, what in rows.items()} for part, rows in truth.items()}
        found = {part: {key: what[0] for key, what in rows.items()} for part, rows in found.items()}
    if facts.val == "list":
        assert found == truth and all(found.values())
        return
    assert found["val"] and not found["val"].keys() & found["train"].keys()
    if name == "caltech101":
        drawn = found["train"] | found["val"]
        assert np.bincount([label for label, _ in drawn.values()]).tolist() == [30, 30, 4]
        assert drawn | found["test"] == truth["test"] and not drawn.keys() & found["test"].keys()
    else:
        assert found["train"] | found["val"] == truth["train"] and found["test"] == truth["test"]
    before = content(tmp_path / "out")  # again, and mended: the same bytes
    (tmp_path / "out" / "val" / "shard-000000.tar").unlink()
    assert run(shard, name, tmp_path / "src", tmp_path / "out") == 0 and content(tmp_path / "out") == before


def test_sizes_add_up_to_what_the_pages_say():
    pages = {"food101": 101_000, "cifar10": 60_000, "cifar100": 60_000, "birdsnap": 49_829, "sun397": 39_700,
             "cars": 16_185, "aircraft": 10_000, "voc07": 9_963, "dtd": 5_640, "pets": 7_349, "caltech101": 9_144,
             "flowers": 8_189}
    assert {name: sum(facts.sizes) for name, facts in transfer.SETS.items()} == pages


@pytest.mark.parametrize("name, counts", [
    ("pets", [93, 87, *[100] * 35]), ("caltech101", [30] * 102), ("sun397", [50] * 397),
    ("cars", [24, 68, *[42] * 98, *[41] * 96]), ("cifar100", [500] * 100)])
def test_what_a_whole_set_holds_out(name, counts):
    """Exactly the published sizes, each class giving its number or its share, and drawn by the seed."""
    facts = transfer.SETS[name]
    assert len(counts) == facts.classes and sum(counts) == sum(facts.sizes[:2])
    items = [Item(f"{label}/{n}", "train", label) for label, count in enumerate(counts) for n in range(count)]
    held = {seed: transfer._hold_out(items, facts, name, seed, True) for seed in (0, 1)}
    val = np.bincount([item.label for item in held[0] if item.part == "val"], minlength=len(counts))
    assert val.sum() == facts.sizes[1] and held[0] != held[1]
    assert [item._replace(part="train") for item in held[0]] == items
    if facts.val == "share":
        assert np.abs(val - np.array(counts) * (facts.sizes[1] / sum(counts))).max() < 1
    else:
        assert set(val.tolist()) == {facts.val}


def test_a_whole_folder_is_counted_and_a_lacking_image_named(made, tmp_path, refused, shard):
    src, out = tmp_path / "src", tmp_path / "out"
    made(mini.dtd)
    sentence = refused("transfer", "dtd", src, out)
    assert "got 3 classes, train 12, val 9, test 6; expected 47 classes, train 1880, val 1880, test 1880" in sentence
    assert "--partial" in sentence
    for n in (1, 2, 5):
        next(src.glob(f"images/*/*_{n:04d}.jpg")).unlink()
    sentence = refused("transfer", "dtd", src, out)
    assert "3 of 27 listed images missing (images/banded/banded_0001.jpg, images/banded/banded_0002.jpg" in sentence
    assert not out.exists()
    assert run(shard, "dtd", src, out) == 0 and len(ShardSet.open(out / "train")) == 9
    for path in src.glob("images/*/*.jpg"):
        path.unlink()
    assert "train 0, val 0, test 0; expected at most 47" in refused(
        "transfer", "dtd", src, tmp_path / "none", "--partial")


def test_more_than_published_is_another_set(made, tmp_path, refused, monkeypatch):
    made(mini.dtd)
    facts = transfer.SETS["dtd"]
    for smaller in ({"classes": 2}, {"sizes": (1880, 8, 1880)}):
        monkeypatch.setitem(transfer.SETS, "dtd", transfer.replace(facts, **smaller))
        assert "expected at most" in refused("transfer", "dtd", tmp_path / "src", tmp_path / "out", "--partial")


def test_folders_that_are_not_the_set(made, tmp_path, refused):
    src, out = tmp_path / "src", tmp_path / "out"
    assert "no such folder" in refused("transfer", "pets", src, out)
    made(mini.flowers)
    sentence = refused("transfer", "pets", src, out)
    assert "got no images/, annotations/trainval.txt, annotations/test.txt" in sentence
    assert "it holds imagelabels.mat, jpg, setid.mat" in sentence and "robots.ox.ac.uk/~vgg/data/pets" in sentence
    (src / "setid.mat").unlink()
    assert "got no setid.mat (it" in refused("transfer", "flowers", src, out)
    assert "got a file" in refused("transfer", "pets", src / "imagelabels.mat", out)
    assert "did you mean 'flowers'" in refused("transfer", "flower", src, out, code=2)
    assert "flowers has one split" in refused("transfer", "flowers", src, out, "--split", 2, code=2)
    assert "--split: got 6; expected 1 to 5" in refused("transfer", "caltech101", src, out, "--split", 6, code=2)
    assert "lies in or holds SRC" in refused("transfer", "flowers", src, src / "out", code=2)
    assert not out.exists()


@pytest.mark.parametrize("name, files", [("cifar10", ["cifar-10-batches-py/data_batch_1"]),
                                         ("cifar100", ["cifar-100-python/train", "cifar-100-python/meta"])])
def test_pickles_are_not_read(name, files, tmp_path, refused):
    for file in files:
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / file).write_bytes(b"\x80\x04.")
    for src in (tmp_path / "src", (tmp_path / "src" / files[0]).parent):
        sentence = refused("transfer", name, src, tmp_path / "out")
        assert "pickle" in sentence and "the binary version" in sentence and "-binary.tar.gz" in sentence


def test_cifar_as_class_folders(tmp_path, picture, shard, caplog):
    m = mini.Maker(tmp_path / "src", picture)
    for part, label, n in m.each():
        m.image(f"{part}/{mini.SLUGS[label]}/{n:04d}.jpg", part, label)
    assert run(shard, "cifar10", tmp_path / "src", tmp_path / "out") == 0
    found, sets = parts_of(tmp_path / "out")
    keyed = {part: {source.removesuffix(".jpg"): what for source, what in rows.items()}
             for part, rows in m.truth.items()}
    assert found["train"] | found["val"] == keyed["train"] and found["test"] == keyed["test"]
    assert sets[0].classes == list(mini.SLUGS) and "somebody encoded CIFAR's pixels again" in caplog.text


def test_cars_in_one_folder(tmp_path, picture, shard):
    m, rows = mini.Maker(tmp_path / "src", picture), []
    for part, label, n in m.each():
        rows.append((f"car_ims/{n:06d}.jpg", label + 1, part == "test"))
        m.image(rows[-1][0], part, label)
    m.write("cars_annos.mat", mini.mat(class_names=np.array(mini.KINDS, object), annotations=np.array(
        rows, [("relative_im_path", object), ("class", np.uint8), ("test", np.uint8)])))
    assert run(shard, "cars", tmp_path / "src", tmp_path / "out") == 0
    found, sets = parts_of(tmp_path / "out")
    keyed = {part: {source.removesuffix(".jpg"): what for source, what in of.items()} for part, of in m.truth.items()}
    assert found["train"] | found["val"] == keyed["train"] and found["test"] == keyed["test"]
    assert sets[0].classes == list(mini.KINDS)


def test_lists_that_make_no_sense(made, tmp_path, refused):
    src, out = tmp_path / "src", tmp_path / "out"
    ninth = np.array([("1.jpg", 9)], [("fname", object), ("class", np.uint8)])
    cases = ((mini.pets, "annotations/test.txt", "Bombay_1"),
             (mini.food101, "meta/test.json", '{"sushi": ["sushi/1"]}'),
             (mini.food101, "meta/train.json", "{"),
             (mini.cars, "devkit/cars_train_annos.mat", "no matlab"),
             (mini.cars, "cars_test_annos_withlabels.mat", mini.mat(annotations=ninth)),
             (mini.cifar10, "data_batch_2.bin", b"cut"),
             (mini.aircraft, "images_variant_val.txt", "1 unknown"),
             (mini.voc07, "ImageSets/Main/bird_val.txt", "1 1"),
             (mini.voc07, "ImageSets/Main/bird_val.txt", "000013 5"),
             (mini.dtd, "labels/val1.txt", "../../secret.jpg"))
    for number, (maker, file, content) in enumerate(cases):
        m, _ = made(maker, str(number))
        m.write(file, content)
        sentence = refused("transfer", maker.__name__, src / str(number), out, "--partial")
        assert "something that cannot be understood" in sentence, sentence
    m, _ = made(mini.dtd, "twice")
    m.write("labels/test1.txt", (m.home / "labels/train1.txt").read_text())
    assert "twice" in refused("transfer", "dtd", m.home, out, "--partial")
    assert not out.exists()


def test_images_of_another_format_are_kept_as_png(made, tmp_path, picture, shard, refused, caplog):
    """Oxford's pets hold GIFs and BMPs that are named .jpg."""
    m, _ = made(mini.pets)
    gif, bmp = "images/Bombay_7.jpg", "images/Bombay_8.jpg"
    m.write(gif, picture(7, "GIF", side=8, mode="P"))
    m.write(bmp, picture(8, "BMP", side=8))
    assert run(shard, "pets", tmp_path / "src", tmp_path / "out") == 0
    assert f"2 images are neither JPEG nor PNG inside, and are kept as PNG: {gif}, {bmp}" in caplog.text
    found, _ = parts_of(tmp_path / "out")
    rows = found["train"] | found["val"]
    for name in (gif, bmp):
        kept = Image.open(io.BytesIO(rows[name.removesuffix(".jpg")][1]))
        assert kept.format == "PNG"
        assert np.array_equal(np.asarray(kept), np.asarray(Image.open(m.home / name).convert("RGB")))
    m.write(gif, b"GIF89a and then nothing")
    m.write("images/Abyssinian_1.jpg", picture(1, side=64)[:500])
    sentence = refused("transfer", "pets", tmp_path / "src", tmp_path / "two", "--partial", "--skip-bad", 0)
    assert "that cannot be used" in sentence
    assert run(shard, "pets", tmp_path / "src", tmp_path / "two", "--skip-bad", 2) == 0


def test_the_splits_of_one_set_differ(made, tmp_path, shard, refused):
    made(mini.caltech101)
    for split in (1, 2):
        assert run(shard, "caltech101", tmp_path / "src", tmp_path / str(split), "--split", split) == 0
    (one, sets), (two, _) = parts_of(tmp_path / "1"), parts_of(tmp_path / "2")
    assert one["test"].keys() != two["test"].keys() and len(one["test"]) == len(two["test"])
    assert sets[0].made["split"] == 1
    assert "split was 1 and is 2" in refused("transfer", "caltech101", tmp_path / "src", tmp_path / "1", "--split", 2,
                                             "--partial", "--workers", 1)
    made(mini.dtd, "textures")
    assert "no labels/train2.txt, labels/val2.txt" in refused(
        "transfer", "dtd", tmp_path / "src" / "textures", tmp_path / "out", "--split", 2, "--partial")
