"""Every published layout of the transfer sets, in miniature, through ``hpcssl-shard transfer --partial``."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_prep import transfer
from data_prep.layouts import Item
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet

KINDS = ("ant bear", "cat", "dog/house")
SLUGS = ("ant_bear", "cat", "dog_house")


class Maker:
    """Writes images and lists below ``home`` and remembers what the shards must hold: (label or targets, bytes)."""

    def __init__(self, home, picture):
        self.home, self.picture, self.count = home, picture, 0
        self.truth = {part: {} for part in transfer.PARTS}

    def image(self, name, part, label):
        body = self.picture(self.count, side=8)
        self.count += 1
        self.write(name, body)
        self.truth[part][name] = label, body

    def write(self, name, content):
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def each(self, train=6, val=0, test=3):
        """(part, class number, running number), the parts as the lists have them."""
        numbers = iter(range(1, 1000))
        return [(part, label, next(numbers)) for part, n in (("train", train), ("val", val), ("test", test))
                for label in range(3) for _ in range(n)]


def food101(m):
    lists = {"train": {}, "test": {}}
    for part, label, n in m.each():
        lists[part].setdefault(SLUGS[label], []).append(f"{SLUGS[label]}/{n}")
        m.image(f"images/{SLUGS[label]}/{n}.jpg", part, label)
    for part, content in lists.items():
        m.write(f"meta/{part}.json", json.dumps(content))
    return SLUGS


def cifar(m, labels, files, classes_file):
    records = {name: [] for name in files}
    order = {part: [name for name in files if name.startswith(("data", "train")) == (part == "train")]
             for part in ("train", "test")}
    for part, label, n in m.each():
        pixels = np.asarray(Image.open(io.BytesIO(m.picture(n, "PNG"))))
        name = order[part][n % len(order[part])]
        source = f"{part}/{KINDS[label]}/{name[:-4]}-{len(records[name]):05d}.png"
        records[name].append(bytes([7] * (labels - 1) + [label]) + pixels.transpose(2, 0, 1).tobytes())
        m.truth[part][source] = label, pixels
    for name, rows in records.items():
        m.write(name, b"".join(rows))
    m.write(classes_file, "\n".join(KINDS) + "\n\n")
    return KINDS


def cifar10(m):
    return cifar(m, 1, [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"], "batches.meta.txt")


def cifar100(m):
    return cifar(m, 2, ["train.bin", "test.bin"], "fine_label_names.txt")


def birdsnap(m):
    rows, test = [], ["path"]
    for part, label, n in m.each():
        path = f"{SLUGS[label]}/{n}.jpg"
        rows.append(f"http://photos/{n}\tmd5\t{path}\t{label + 1}\t1")
        test += [path] * (part == "test")
        m.image(f"download/images/{path}", part, label)
    m.write("images.txt", "\n".join(["url\tmd5\tpath\tspecies_id\tbb_x1", *rows]))
    m.write("species.txt", "id\tcommon\tscientific\tdir\n" + "".join(
        f"{i + 1}\t{KINDS[i]}\tx\t{SLUGS[i]}\n" for i in range(3)))
    m.write("test_images.txt", "\n".join(test))
    return KINDS


def sun397(m):
    folders = ("/a/abbey", "/b/barn/inside", "/b/barn/outside")
    lists = {"train": [], "test": []}
    for part, label, n in m.each():
        lists[part].append(f"{folders[label]}/sun_{n}.jpg")
        m.image(f"SUN397{folders[label]}/sun_{n}.jpg", part, label)
    m.write("Partitions/ClassName.txt", "\n".join(folders))
    m.write("Partitions/Training_01.txt", "\n".join(lists["train"]))
    m.write("Partitions/Testing_01.txt", "\n".join(lists["test"]))
    return "abbey", "barn/inside", "barn/outside"


def mat(**arrays):
    body = io.BytesIO()
    savemat(body, arrays)
    return body.getvalue()


def cars(m):
    rows = {"train": [], "test": []}
    for part, label, n in m.each():
        rows[part].append((f"{n:05d}.jpg", label + 1))
        m.image(f"cars_{part}/{n:05d}.jpg", part, label)
    notes = {part: np.array(rows[part], [("fname", object), ("class", np.uint8)]) for part in rows}
    m.write("devkit/cars_meta.mat", mat(class_names=np.array(KINDS, object)))
    m.write("devkit/cars_train_annos.mat", mat(annotations=notes["train"]))
    m.write("cars_test_annos_withlabels.mat", mat(annotations=notes["test"]))
    return KINDS


def aircraft(m):
    lists = {part: [] for part in transfer.PARTS}
    for part, label, n in m.each(4, 3, 2):
        lists[part].append(f"{n:07d} {KINDS[label]}")
        m.image(f"images/{n:07d}.jpg", part, label)
    for part, lines in lists.items():
        m.write(f"images_variant_{part}.txt", "\n".join(lines))
    m.write("variants.txt", "\n".join(KINDS))
    return KINDS


def voc07(m):
    kinds, lists = ("aeroplane", "bicycle", "bird"), {part: {} for part in transfer.PARTS}
    for part, label, n in m.each(4, 3, 2):
        targets = [(1, -1, 0)[(label + c * n) % 3] for c in range(3)]
        lists[part][f"{n:06d}"] = targets
        m.image(f"JPEGImages/{n:06d}.jpg", part, targets)
    for part, rows in lists.items():
        m.write(f"ImageSets/Main/{part}.txt", "\n".join(rows))
        for c, kind in enumerate(kinds):
            m.write(f"ImageSets/Main/{kind}_{part}.txt", "\n".join(f"{n} {t[c]:2d}" for n, t in rows.items()))
    return kinds


def dtd(m):
    kinds, lists = ("banded", "dotted", "woven"), {part: [] for part in transfer.PARTS}
    for part, label, n in m.each(4, 3, 2):
        lists[part].append(f"{kinds[label]}/{kinds[label]}_{n:04d}.jpg")
        m.image(f"images/{lists[part][-1]}", part, label)
    for part, lines in lists.items():
        m.write(f"labels/{part}1.txt", "\n".join(lines))
    return kinds


def pets(m):
    kinds, lists = ("Abyssinian", "Bombay", "great_pyrenees"), {"train": [], "test": []}
    for part, label, n in m.each():
        lists[part].append(f"{kinds[label]}_{n} {label + 1} 1 1")
        m.image(f"images/{kinds[label]}_{n}.jpg", part, label)
    m.write("annotations/trainval.txt", "\n".join(lists["train"]))
    m.write("annotations/test.txt", "#Image CLASS-ID SPECIES BREED\n" + "\n".join(lists["test"]))
    return kinds


def caltech101(m):
    kinds = ("BACKGROUND_Google", "Faces_easy", "accordion")
    for label, count in enumerate((33, 31, 8)):
        for n in range(count):
            m.image(f"{kinds[label]}/image_{n:04d}.jpg", "test", label)
    m.write("BACKGROUND_Google/tmp", "a stray file of the archive")
    return kinds


def flowers(m):
    labels, ids = np.zeros(27, int), {part: [] for part in transfer.PARTS}
    for part, label, n in m.each(4, 3, 2):
        labels[n - 1] = label + 1
        ids[part].append(n)
        m.image(f"jpg/image_{n:05d}.jpg", part, label)
    m.write("imagelabels.mat", mat(labels=labels))
    m.write("setid.mat", mat(trnid=ids["train"], valid=ids["val"], tstid=ids["test"]))
    return "1", "2", "3"


MAKERS = (food101, cifar10, cifar100, birdsnap, sun397, cars, aircraft, voc07, dtd, pets, caltech101, flowers)


@pytest.fixture
def made(tmp_path, picture):
    """Write the miniature of a set into tmp_path/src; returns its maker and its classes."""

    def make(maker, home=""):
        m = Maker(tmp_path / "src" / home, picture)
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
    assert [maker.__name__ for maker in MAKERS] == list(transfer.SETS)


@pytest.mark.parametrize("maker", MAKERS)
def test_layout(maker, made, tmp_path, shard, content):
    name, facts = maker.__name__, transfer.SETS[maker.__name__]
    home = facts.layouts[0].homes[-1] if facts.layouts[0].homes else ""
    m, classes = made(maker, home)
    assert run(shard, name, tmp_path / "src", tmp_path / "out") == 0
    found, sets = parts_of(tmp_path / "out")
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
    made(dtd)
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
    made(dtd)
    facts = transfer.SETS["dtd"]
    for smaller in ({"classes": 2}, {"sizes": (1880, 8, 1880)}):
        monkeypatch.setitem(transfer.SETS, "dtd", transfer.replace(facts, **smaller))
        assert "expected at most" in refused("transfer", "dtd", tmp_path / "src", tmp_path / "out", "--partial")


def test_folders_that_are_not_the_set(made, tmp_path, refused):
    src, out = tmp_path / "src", tmp_path / "out"
    assert "no such folder" in refused("transfer", "pets", src, out)
    made(flowers)
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
    m = Maker(tmp_path / "src", picture)
    for part, label, n in m.each():
        m.image(f"{part}/{SLUGS[label]}/{n:04d}.jpg", part, label)
    assert run(shard, "cifar10", tmp_path / "src", tmp_path / "out") == 0
    found, sets = parts_of(tmp_path / "out")
    keyed = {part: {source.removesuffix(".jpg"): what for source, what in rows.items()}
             for part, rows in m.truth.items()}
    assert found["train"] | found["val"] == keyed["train"] and found["test"] == keyed["test"]
    assert sets[0].classes == list(SLUGS) and "somebody encoded CIFAR's pixels again" in caplog.text


def test_cars_in_one_folder(tmp_path, picture, shard):
    m, rows = Maker(tmp_path / "src", picture), []
    for part, label, n in m.each():
        rows.append((f"car_ims/{n:06d}.jpg", label + 1, part == "test"))
        m.image(rows[-1][0], part, label)
    m.write("cars_annos.mat", mat(class_names=np.array(KINDS, object), annotations=np.array(
        rows, [("relative_im_path", object), ("class", np.uint8), ("test", np.uint8)])))
    assert run(shard, "cars", tmp_path / "src", tmp_path / "out") == 0
    found, sets = parts_of(tmp_path / "out")
    keyed = {part: {source.removesuffix(".jpg"): what for source, what in of.items()} for part, of in m.truth.items()}
    assert found["train"] | found["val"] == keyed["train"] and found["test"] == keyed["test"]
    assert sets[0].classes == list(KINDS)


def test_lists_that_make_no_sense(made, tmp_path, refused):
    src, out = tmp_path / "src", tmp_path / "out"
    cases = ((pets, "annotations/test.txt", "Bombay_1"), (food101, "meta/test.json", '{"sushi": ["sushi/1"]}'),
             (food101, "meta/train.json", "{"), (cars, "devkit/cars_train_annos.mat", "no matlab"),
             (cars, "cars_test_annos_withlabels.mat", mat(annotations=np.array(
                 [("1.jpg", 9)], [("fname", object), ("class", np.uint8)]))),
             (cifar10, "data_batch_2.bin", b"cut"), (aircraft, "images_variant_val.txt", "1 unknown"),
             (voc07, "ImageSets/Main/bird_val.txt", "1 1"), (voc07, "ImageSets/Main/bird_val.txt", "000013 5"),
             (dtd, "labels/val1.txt", "../../secret.jpg"))
    for number, (maker, file, content) in enumerate(cases):
        m, _ = made(maker, str(number))
        m.write(file, content)
        sentence = refused("transfer", maker.__name__, src / str(number), out, "--partial")
        assert "something that cannot be understood" in sentence, sentence
    m, _ = made(dtd, "twice")
    m.write("labels/test1.txt", (m.home / "labels/train1.txt").read_text())
    assert "twice" in refused("transfer", "dtd", m.home, out, "--partial")
    assert not out.exists()


def test_images_of_another_format_are_kept_as_png(made, tmp_path, picture, shard, refused, caplog):
    """Oxford's pets hold GIFs and BMPs that are named .jpg."""
    m, _ = made(pets)
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
    made(caltech101)
    for split in (1, 2):
        assert run(shard, "caltech101", tmp_path / "src", tmp_path / str(split), "--split", split) == 0
    (one, sets), (two, _) = parts_of(tmp_path / "1"), parts_of(tmp_path / "2")
    assert one["test"].keys() != two["test"].keys() and len(one["test"]) == len(two["test"])
    assert sets[0].made["split"] == 1
    assert "split was 1 and is 2" in refused("transfer", "caltech101", tmp_path / "src", tmp_path / "1", "--split", 2,
                                             "--partial", "--workers", 1)
    made(dtd, "textures")
    assert "no labels/train2.txt, labels/val2.txt" in refused(
        "transfer", "dtd", tmp_path / "src" / "textures", tmp_path / "out", "--split", 2, "--partial")
