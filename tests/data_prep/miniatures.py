"""Small copies of the transfer sets: three classes and a few tiny images, in the files and lists of the original."""

import io
import json

import numpy as np
from PIL import Image
from scipy.io import savemat

from data_prep.sources.transfer import data_sets

CLASSES = ("ant bear", "cat", "dog/house")
SLUGS = ("ant_bear", "cat", "dog_house")


class Maker:
    """Writes images and lists below ``home``, and records in ``truth`` what the shards must hold.

    Attributes:
        truth: part -> name of the image -> (label or targets, bytes).
    """

    def __init__(self, home, encode_image):
        self.home, self.encode_image, self.count = home, encode_image, 0
        self.truth = {part: {} for part in data_sets.PARTS}

    def image(self, name, part, label):
        body = self.encode_image(self.count, side=8)
        self.count += 1
        self.write(name, body)
        self.truth[part][name] = label, body

    def write(self, name, content):
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def each(self, train=6, val=0, test=3):
        """(part, class number, running number) of each image, in the parts of the lists."""
        numbers = iter(range(1, 1000))
        return [
            (part, label, next(numbers))
            for part, n in (("train", train), ("val", val), ("test", test))
            for label in range(3)
            for _ in range(n)
        ]


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
    order = {
        part: [name for name in files if name.startswith(("data", "train")) == (part == "train")]
        for part in ("train", "test")
    }
    for part, label, n in m.each():
        pixels = np.asarray(Image.open(io.BytesIO(m.encode_image(n, "PNG"))))
        name = order[part][n % len(order[part])]
        source = f"{part}/{CLASSES[label]}/{name[:-4]}-{len(records[name]):05d}.png"
        records[name].append(bytes([7] * (labels - 1) + [label]) + pixels.transpose(2, 0, 1).tobytes())
        m.truth[part][source] = label, pixels
    for name, rows in records.items():
        m.write(name, b"".join(rows))
    m.write(classes_file, "\n".join(CLASSES) + "\n\n")
    return CLASSES


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
    m.write(
        "species.txt",
        "id\tcommon\tscientific\tdir\n" + "".join(f"{i + 1}\t{CLASSES[i]}\tx\t{SLUGS[i]}\n" for i in range(3)),
    )
    m.write("test_images.txt", "\n".join(test))
    return CLASSES


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
    annotations = {part: np.array(rows[part], [("fname", object), ("class", np.uint8)]) for part in rows}
    m.write("devkit/cars_meta.mat", mat(class_names=np.array(CLASSES, object)))
    m.write("devkit/cars_train_annos.mat", mat(annotations=annotations["train"]))
    m.write("cars_test_annos_withlabels.mat", mat(annotations=annotations["test"]))
    return CLASSES


def aircraft(m):
    lists = {part: [] for part in data_sets.PARTS}
    for part, label, n in m.each(4, 3, 2):
        lists[part].append(f"{n:07d} {CLASSES[label]}")
        m.image(f"images/{n:07d}.jpg", part, label)
    for part, lines in lists.items():
        m.write(f"images_variant_{part}.txt", "\n".join(lines))
    m.write("variants.txt", "\n".join(CLASSES))
    return CLASSES


def voc07(m):
    classes, lists = ("aeroplane", "bicycle", "bird"), {part: {} for part in data_sets.PARTS}
    for part, label, n in m.each(4, 3, 2):
        targets = [(1, -1, 0)[(label + c * n) % 3] for c in range(3)]
        lists[part][f"{n:06d}"] = targets
        m.image(f"JPEGImages/{n:06d}.jpg", part, targets)
    for part, rows in lists.items():
        m.write(f"ImageSets/Main/{part}.txt", "\n".join(rows))
        for c, name in enumerate(classes):
            m.write(f"ImageSets/Main/{name}_{part}.txt", "\n".join(f"{n} {t[c]:2d}" for n, t in rows.items()))
    return classes


def dtd(m):
    classes, lists = ("banded", "dotted", "woven"), {part: [] for part in data_sets.PARTS}
    for part, label, n in m.each(4, 3, 2):
        lists[part].append(f"{classes[label]}/{classes[label]}_{n:04d}.jpg")
        m.image(f"images/{lists[part][-1]}", part, label)
    for part, lines in lists.items():
        m.write(f"labels/{part}1.txt", "\n".join(lines))
    return classes


def pets(m):
    classes, lists = ("Abyssinian", "Bombay", "great_pyrenees"), {"train": [], "test": []}
    for part, label, n in m.each():
        lists[part].append(f"{classes[label]}_{n} {label + 1} 1 1")
        m.image(f"images/{classes[label]}_{n}.jpg", part, label)
    m.write("annotations/trainval.txt", "\n".join(lists["train"]))
    m.write("annotations/test.txt", "#Image CLASS-ID SPECIES BREED\n" + "\n".join(lists["test"]))
    return classes


def caltech101(m):
    classes = ("BACKGROUND_Google", "Faces_easy", "accordion")
    for label, count in enumerate((33, 31, 8)):
        for n in range(count):
            m.image(f"{classes[label]}/image_{n:04d}.jpg", "test", label)
    m.write("BACKGROUND_Google/tmp", "a stray file of the archive")
    return classes


def flowers(m):
    labels, ids = np.zeros(27, int), {part: [] for part in data_sets.PARTS}
    for part, label, n in m.each(4, 3, 2):
        labels[n - 1] = label + 1
        ids[part].append(n)
        m.image(f"jpg/image_{n:05d}.jpg", part, label)
    m.write("imagelabels.mat", mat(labels=labels))
    m.write("setid.mat", mat(trnid=ids["train"], valid=ids["val"], tstid=ids["test"]))
    return "1", "2", "3"


MAKERS = (food101, cifar10, cifar100, birdsnap, sun397, cars, aircraft, voc07, dtd, pets, caltech101, flowers)
