"""``hpcssl-shard detection``: VOC and COCO as shards with boxes, and errors for damaged folders."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.printed import numbers_in

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    "<bndbox><xmax>{}</xmax><xmin>{}</xmin><ymin>{}</ymin><ymax>{}</ymax></bndbox></object>"
)


def write_image(path, index):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), 20 + index, np.uint8)).save(path)


def read_sample_json(folder):
    """The content of KEY.json of every sample, by its source."""
    samples = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    sample = json.load(io.TextIOWrapper(tar.extractfile(member)))
                    samples[sample["source"]] = sample
    return samples


@pytest.fixture
def voc(tmp_path):
    """A VOCdevkit with one image of 2007 trainval, two of 2012 trainval and one of 2007 test."""
    root = tmp_path / "disk" / "VOCdevkit"
    for index, (year, split, name) in enumerate(
        [
            ("VOC2007", "trainval", "000005"),
            ("VOC2012", "trainval", "2008_1"),
            ("VOC2012", "trainval", "2008_2"),
            ("VOC2007", "test", "000001"),
        ]
    ):
        write_image(root / year / "JPEGImages" / f"{name}.jpg", index)
        for folder in ("Annotations", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        with open(root / year / "ImageSets" / "Main" / f"{split}.txt", "a") as listed:
            listed.write(f"{name}\n")
        objects = OBJECT.format("dog", index % 2, 21, 11, 3, 9.5) + OBJECT.format("aeroplane", 0, 60, 1, 1, 40)
        (root / year / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>60</width><height>40</height></size>{objects}</annotation>"
        )
    return root


@pytest.fixture
def coco(tmp_path):
    """Three training images, one of them without an object, and one for validation; category ids have gaps."""
    root = tmp_path / "coco"
    for part, count in (("train2017", 3), ("val2017", 1)):
        for index in range(count):
            write_image(root / part / f"{index:012d}.jpg", index)
        ring = [[10, 5, 30, 5, 30, 25]]
        crowd = {"counts": [0, 40 * 60], "size": [40, 60]}
        objects = [
            {
                "image_id": 0,
                "bbox": [10, 5, 20.5, 20],
                "category_id": 18,
                "iscrowd": 0,
                "area": 200,
                "segmentation": ring,
                "id": 1,
            }
        ]
        if count > 1:
            objects.append(
                {
                    "image_id": 2,
                    "bbox": [0, 0, 60, 40],
                    "category_id": 1,
                    "iscrowd": 1,
                    "area": 2400,
                    "segmentation": crowd,
                    "id": 2,
                }
            )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(
            json.dumps(
                {
                    "images": [
                        {"id": i, "file_name": f"{i:012d}.jpg", "height": 40, "width": 60} for i in range(count)
                    ],
                    "annotations": objects,
                    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
                }
            )
        )
    return root


def test_boxes_and_labels_of_voc(voc, tmp_path, capsys, run_shard):
    out = tmp_path / "out"
    assert run_shard("detection", "voc", voc, out, "--workers", 1) == 0
    train, val = read_sample_json(out / "train"), read_sample_json(out / "val")
    assert sorted(train) == [
        "VOC2007/JPEGImages/000005.jpg",
        "VOC2012/JPEGImages/2008_1.jpg",
        "VOC2012/JPEGImages/2008_2.jpg",
    ]
    # pixels from 1, the last one included: 11 … 21 is the area from 10 to 21
    assert train["VOC2012/JPEGImages/2008_1.jpg"] == {
        "source": "VOC2012/JPEGImages/2008_1.jpg",
        "size": [40, 60],
        "boxes": [[10, 2, 21, 9.5], [0, 0, 60, 40]],
        "labels": [11, 0],
        "difficult": [1, 0],
    }
    assert list(val) == ["VOC2007/JPEGImages/000001.jpg"]
    for part in ("train", "val"):
        assert run_shard("verify", out / part) == 0
    assert run_shard("show", out / "val") == 0
    records = capsys.readouterr().out
    assert "class\t11\tdog" in records and "provenance\tdataset\tvoc" in records


def test_boxes_labels_and_masks_of_coco(coco, tmp_path, run_shard):
    out = tmp_path / "out"
    assert run_shard("detection", "coco", coco, out, "--workers", 1) == 0
    train = read_sample_json(out / "train")
    assert json.loads((out / "val" / "index.json").read_text())["classes"] == ["person", "dog"]
    assert train["train2017/000000000000.jpg"] == {
        "source": "train2017/000000000000.jpg",
        "size": [40, 60],
        "boxes": [[10, 5, 30.5, 25]],
        "labels": [1],
        "iscrowd": [0],
        "area": [200],
        "segmentation": [[[10, 5, 30, 5, 30, 25]]],
    }
    assert train["train2017/000000000001.jpg"]["boxes"] == []
    assert train["train2017/000000000002.jpg"]["segmentation"] == [{"counts": [0, 2400], "size": [40, 60]}]


def test_a_subset_keeps_its_boxes(coco, tmp_path, run_shard):
    assert run_shard("detection", "coco", coco, tmp_path / "out", "--workers", 1) == 0
    (tmp_path / "list").write_text("000000000002.jpg\n")
    assert run_shard("subset", tmp_path / "out" / "train", tmp_path / "one", "--list", tmp_path / "list") == 0
    whole, one = read_sample_json(tmp_path / "out" / "train"), read_sample_json(tmp_path / "one")
    assert one == {"train2017/000000000002.jpg": whole["train2017/000000000002.jpg"]}


def test_the_same_command_refuses_changed_boxes(voc, tmp_path, capsys, run_shard, error_of):
    assert run_shard("detection", "voc", voc, tmp_path / "out", "--workers", 1) == 0
    assert run_shard("detection", "voc", voc, tmp_path / "out", "--workers", 1) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [numbers_in(line)[-3:-1] for line in lines] == [[1, 1], [1, 1]]  # shards, and those that were kept
    path = voc / "VOC2007" / "Annotations" / "000001.xml"
    path.write_text(path.read_text().replace("<xmin>11</xmin>", "<xmin>12</xmin>"))
    error = error_of("detection", "voc", voc, tmp_path / "out", "--workers", 1)
    assert str(tmp_path / "out") in error.what and not error.got.startswith("a folder")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def write_box(root, name, *numbers):
    """An annotation of an image of 6 x 4 pixels with one object."""
    (root / "VOC2007/Annotations/000005.xml").write_text(
        "<annotation><size><width>6</width><height>4</height></size>"
        + OBJECT.format(name, 0, *numbers)
        + "</annotation>"
    )


@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda root: (root / "VOC2007/ImageSets/Main/test.txt").unlink(), "VOC2007/ImageSets/Main/test.txt"),
        (lambda root: (root / "VOC2012/JPEGImages/2008_2.jpg").unlink(), "VOC2012/JPEGImages/2008_2.jpg"),
        (lambda root: (root / "VOC2007/Annotations/000005.xml").unlink(), "VOC2007/Annotations/000005.xml"),
        (lambda root: shutil.rmtree(root / "VOC2012/Annotations"), "VOC2012/Annotations"),
        (lambda root: truncate(root / "VOC2007/Annotations/000005.xml"), "000005.xml"),
        (lambda root: write_box(root, "wolf", 2, 1, 1, 2), "000005.xml"),  # no class of VOC
        (lambda root: write_box(root, "dog", 1, 3, 1, 2), "[2"),  # a box that ends before it begins
    ],
)
def test_a_damaged_devkit_is_refused(voc, tmp_path, error_of, damage, name):
    damage(voc)
    error = error_of("detection", "voc", voc, tmp_path / "out", "--workers", 1)
    assert str(voc) in error.what and name in f"{error.what} {error.got}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda root: shutil.rmtree(root / "val2017"), "val2017"),
        (lambda root: (root / "train2017/000000000001.jpg").unlink(), "train2017/000000000001.jpg"),
        (lambda root: truncate(root / "annotations/instances_train2017.json"), "instances_train2017.json"),
        (lambda root: (root / "annotations/instances_val2017.json").write_text('{"images": []}'), "KeyError"),
    ],
)
def test_a_damaged_coco_folder_is_refused(coco, tmp_path, error_of, damage, name):
    damage(coco)
    error = error_of("detection", "coco", coco, tmp_path / "out", "--workers", 1)
    assert str(coco) in error.what and name in f"{error.what} {error.got}"
    assert not (tmp_path / "out").exists()


def test_other_folders_and_sets_are_refused(voc, coco, tmp_path, error_of):
    assert str(voc) in error_of("detection", "voc", voc.parent, tmp_path / "out").fix
    error = error_of("detection", "voc", coco, tmp_path / "out")
    assert str(coco) in error.what and "VOCdevkit" in f"{error.expected} {error.fix}"
    error = error_of("detection", "cocoa", coco, tmp_path / "out", code=2)
    assert "cocoa" in error.got and "'coco'" in error.fix
