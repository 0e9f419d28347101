"""``hpcssl-shard detection``: the folders of VOC and COCO as shards with boxes, and what is wrong with a folder."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main

THING = ("<object><name>{}</name><difficult>{}</difficult><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
         "<bndbox><xmax>{}</xmax><xmin>{}</xmin><ymin>{}</ymin><ymax>{}</ymax></bndbox></object>")


def shard(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def jpeg(path, index):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), 20 + index, np.uint8)).save(path)


def notes(folder):
    """KEY.json of every sample, by source."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    note = json.load(io.TextIOWrapper(tar.extractfile(member)))
                    found[note["source"]] = note
    return found


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit with one picture of 2007 trainval, two of 2012 and one of the test."""
    root = tmp_path / "disk" / "VOCdevkit"
    for index, (year, split, name) in enumerate([("VOC2007", "trainval", "000005"), ("VOC2012", "trainval", "2008_1"),
                                                 ("VOC2012", "trainval", "2008_2"), ("VOC2007", "test", "000001")]):
        jpeg(root / year / "JPEGImages" / f"{name}.jpg", index)
        for folder in ("Annotations", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        with open(root / year / "ImageSets" / "Main" / f"{split}.txt", "a") as listed:
            listed.write(f"{name}\n")
        things = THING.format("dog", index % 2, 21, 11, 3, 9.5) + THING.format("aeroplane", 0, 60, 1, 1, 40)
        (root / year / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>60</width><height>40</height></size>{things}</annotation>")
    return root


@pytest.fixture
def coco(tmp_path):
    """Three training pictures (one without an object) and one to validate on; ids of categories with gaps."""
    root = tmp_path / "coco"
    for part, count in (("train2017", 3), ("val2017", 1)):
        for index in range(count):
            jpeg(root / part / f"{index:012d}.jpg", index)
        ring = [[10, 5, 30, 5, 30, 25]]
        crowd = {"counts": [0, 40 * 60], "size": [40, 60]}
        things = [{"image_id": 0, "bbox": [10, 5, 20.5, 20], "category_id": 18, "iscrowd": 0, "area": 200,
                   "segmentation": ring, "id": 1}]
        if count > 1:
            things.append({"image_id": 2, "bbox": [0, 0, 60, 40], "category_id": 1, "iscrowd": 1, "area": 2400,
                           "segmentation": crowd, "id": 2})
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 40, "width": 60} for i in range(count)],
            "annotations": things, "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]}))
    return root


def test_voc(voc, tmp_path, capsys):
    out = tmp_path / "out"
    assert shard("detection", "voc", voc, out, "--workers", 1) == 0
    train, val = notes(out / "train"), notes(out / "val")
    assert sorted(train) == ["VOC2007/JPEGImages/000005.jpg", "VOC2012/JPEGImages/2008_1.jpg",
                             "VOC2012/JPEGImages/2008_2.jpg"]
    # pixels from 1, the last one included: 11 … 21 is the area from 10 to 21
    assert train["VOC2012/JPEGImages/2008_1.jpg"] == {
        "source": "VOC2012/JPEGImages/2008_1.jpg", "size": [40, 60], "boxes": [[10, 2, 21, 9.5], [0, 0, 60, 40]],
        "labels": [11, 0], "difficult": [1, 0]}
    assert list(val) == ["VOC2007/JPEGImages/000001.jpg"]
    for part in ("train", "val"):
        assert shard("verify", out / part) == 0
    assert shard("show", out / "val") == 0
    said = capsys.readouterr().out
    assert "class\t11\tdog" in said and "made\tdataset\tvoc" in said


def test_coco(coco, tmp_path):
    out = tmp_path / "out"
    assert shard("detection", "coco", coco, out, "--workers", 1) == 0
    train = notes(out / "train")
    assert json.loads((out / "val" / "index.json").read_text())["classes"] == ["person", "dog"]
    assert train["train2017/000000000000.jpg"] == {
        "source": "train2017/000000000000.jpg", "size": [40, 60], "boxes": [[10, 5, 30.5, 25]], "labels": [1],
        "iscrowd": [0], "area": [200], "segmentation": [[[10, 5, 30, 5, 30, 25]]]}
    assert train["train2017/000000000001.jpg"]["boxes"] == []
    assert train["train2017/000000000002.jpg"]["segmentation"] == [{"counts": [0, 2400], "size": [40, 60]}]


def test_a_subset_keeps_its_boxes(coco, tmp_path):
    assert shard("detection", "coco", coco, tmp_path / "out", "--workers", 1) == 0
    (tmp_path / "list").write_text("000000000002.jpg\n")
    assert shard("subset", tmp_path / "out" / "train", tmp_path / "one", "--list", tmp_path / "list") == 0
    whole, one = notes(tmp_path / "out" / "train"), notes(tmp_path / "one")
    assert one == {"train2017/000000000002.jpg": whole["train2017/000000000002.jpg"]}


def test_other_boxes_are_another_source(voc, tmp_path, capsys):
    assert shard("detection", "voc", voc, tmp_path / "out", "--workers", 1) == 0
    assert shard("detection", "voc", voc, tmp_path / "out", "--workers", 1) == 0  # the same again keeps all
    assert "kept from before" in capsys.readouterr().out
    path = voc / "VOC2007" / "Annotations" / "000001.xml"
    path.write_text(path.read_text().replace("<xmin>11</xmin>", "<xmin>12</xmin>"))
    assert shard("detection", "voc", voc, tmp_path / "out", "--workers", 1) == 1
    assert "shards of another source" in capsys.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("harm, said", [
    (lambda root: (root / "VOC2007/ImageSets/Main/test.txt").unlink(), "no VOC2007/ImageSets/Main/test.txt"),
    (lambda root: (root / "VOC2012/JPEGImages/2008_2.jpg").unlink(), "VOC2012/JPEGImages/2008_2.jpg"),
    (lambda root: (root / "VOC2007/Annotations/000005.xml").unlink(), "VOC2007/Annotations/000005.xml"),
    (lambda root: shutil.rmtree(root / "VOC2012/Annotations"), "VOC2012/Annotations"),
    (lambda root: cut(root / "VOC2007/Annotations/000005.xml"), "000005.xml"),
    (lambda root: (root / "VOC2007/Annotations/000005.xml").write_text(
        "<annotation><size><width>6</width><height>4</height></size>" + THING.format("wolf", 0, 2, 1, 1, 2) +
        "</annotation>"), "000005.xml"),
    (lambda root: (root / "VOC2007/Annotations/000005.xml").write_text(
        "<annotation><size><width>6</width><height>4</height></size>" + THING.format("dog", 0, 1, 3, 1, 2) +
        "</annotation>"), "the box"),
])
def test_a_broken_devkit_is_named(voc, tmp_path, capsys, harm, said):
    harm(voc)
    assert shard("detection", "voc", voc, tmp_path / "out", "--workers", 1) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("harm, said", [
    (lambda root: shutil.rmtree(root / "val2017"), "no val2017"),
    (lambda root: (root / "train2017/000000000001.jpg").unlink(), "train2017/000000000001.jpg"),
    (lambda root: cut(root / "annotations/instances_train2017.json"), "instances_train2017.json"),
    (lambda root: (root / "annotations/instances_val2017.json").write_text('{"images": []}'), "KeyError"),
])
def test_a_broken_coco_is_named(coco, tmp_path, capsys, harm, said):
    harm(coco)
    assert shard("detection", "coco", coco, tmp_path / "out", "--workers", 1) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_names_are_named(voc, coco, tmp_path, capsys):
    assert shard("detection", "voc", voc.parent, tmp_path / "out") == 1
    assert f"to mend: name {voc}" in capsys.readouterr().err
    assert shard("detection", "voc", coco, tmp_path / "out") == 1
    assert "VOCdevkit as the archives unpack" in capsys.readouterr().err
    assert shard("detection", "cocoa", coco, tmp_path / "out") == 2
    assert "did you mean 'coco'" in capsys.readouterr().err
