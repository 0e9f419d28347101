"""``hpcssl search``: the nearest images by cosine, of a row or of an image file, and their picture."""

import shutil

import numpy as np
import pytest
from PIL import Image

import hpcssl
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, DataError, EvalError
from hpcssl.inference import embeddings, search


@pytest.fixture(scope="module")
def features(run, photos, tmp_path_factory):
    """The features of ``photos`` in a file."""
    path = tmp_path_factory.mktemp("features") / "e.npy"
    hpcssl.embed(run.root, photos, path, skip_bad=2, devices="cpu")
    return path


def test_hits_of_a_row_are_the_largest_cosines_without_the_row(features):
    table = embeddings.read(features)
    unit = table.features / np.linalg.norm(table.features, axis=1, keepdims=True)
    cosine = unit @ unit[4]
    hits = search.search_row(table, 4, top=5)
    assert hits.queries == [table.keys[4]] and hits.rows.shape == (1, 5)
    assert hits.rows[0].tolist() == [row for row in np.argsort(-cosine) if row != 4][:5]
    np.testing.assert_allclose(hits.similarity[0], cosine[hits.rows[0]], atol=1e-6)
    assert search.search_row(table, 0, top=99).rows.shape == (1, len(table) - 1)
    with pytest.raises(ConfigError) as caught:
        search.search_row(table, len(table))
    assert caught.value.what == "--row"


def test_an_image_finds_itself_with_the_recorded_weights_only(features, photos, run, tmp_path):
    table = embeddings.read(features)
    moved = shutil.copy(photos / table.keys[9], tmp_path / "query.img")
    hits = search.search_images(table, [moved], top=2, devices="cpu")
    assert hits.rows[0, 0] == 9 and hits.similarity[0, 0] == pytest.approx(1, abs=1e-6)
    copied = shutil.copy(run.weights_at(5), tmp_path / "copied.safetensors")
    for weights in (copied, run.root):
        assert (
            search.search_images(table, [moved], 2, weights=weights, devices="cpu").rows.tolist() == hits.rows.tolist()
        )
    with pytest.raises(EvalError) as other:
        search.search_images(table, [moved], weights=run.weights_at(0), devices="cpu")
    assert "sha256" in other.value.got
    table.metadata["weights"] = str(tmp_path / "gone")
    with pytest.raises(EvalError) as gone:
        search.search_images(table, [moved], devices="cpu")
    assert "--weights" in gone.value.fix


def test_the_command_prints_a_table_and_draws_a_picture(features, photos, tmp_path, run_command):
    table = embeddings.read(features)
    query = photos / table.keys[3]
    words = ("search", features, "--top", 3)
    queries = ("--query", query, "--query", query, "--devices", "cpu")
    code, out, err, _ = run_command(*words, *queries, "--to", tmp_path / "hits.png")
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and lines[0] == ["query", "rank", "cosine", "row", "image"] and len(lines) == 7
    assert lines[1][1:] == ["1", "1.0000", "3", table.keys[3]] and "hpcssl export" in err
    picture = np.asarray(Image.open(tmp_path / "hits.png").convert("RGB"))
    assert picture.shape[0] > 200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
    code, out, _, _ = run_command(*words, "--row", 3, "--to", tmp_path / "row.png")
    assert code == 0 and len(out.splitlines()) == 4 and (tmp_path / "row.png").stat().st_size > 1000


def test_a_picture_opens_the_shards_of_its_images_only(run, shards, tmp_path, monkeypatch):
    table = hpcssl.embed(run.root, shards.root, tmp_path / "e.npy", devices="cpu")
    names, find_key = [], ShardSet.find_key
    monkeypatch.setattr(ShardSet, "find_key", lambda self, index: names.append(index) or find_key(self, index))
    hits = search.search_row(table, 7, top=2)
    search.draw_hits(table, hits, None, tmp_path / "hits.png", row=7)
    assert sorted(names) == sorted({7, *hits.rows[0].tolist()})
    table.keys[7] = "another"
    with pytest.raises(DataError) as caught:
        search.draw_hits(table, hits, None, tmp_path / "hits.png", row=7)
    assert "another" in caught.value.got


def test_images_are_found_among_new_ones(features, photos, tmp_path):
    table = embeddings.read(features)
    folder = shutil.copytree(photos, tmp_path / "more")
    shutil.copy(photos / table.keys[0], folder / "0.jpg")  # the first by name: every number is one more
    search.draw_hits(table, search.search_row(table, 0, top=2), folder, tmp_path / "hits.png", row=0)
    (folder / table.keys[0]).unlink()
    with pytest.raises(DataError) as caught:
        search.draw_hits(table, search.search_row(table, 0, top=2), folder, tmp_path / "hits.png", row=0)
    assert table.keys[0] in caught.value.got


def test_mistakes_are_refused(features, photos, tmp_path, run_command):
    for words, what in (
        ((), "hpcssl search"),
        (("--row", 0, "--query", photos), "hpcssl search"),
        (("--row", 0, "--run", tmp_path), "hpcssl search"),
        (("--row", 0, "--devices", "cpu"), "hpcssl search"),
        (("--row", 0, "--images", photos), "hpcssl search"),
        (("--query", photos, "--step", 0), "hpcssl search"),
        (("--row", 0, "--to", tmp_path / "hits.jpg"), "--to"),
        (("--row", 0, "--to", tmp_path / "hits.png", "--images", tmp_path), "images"),
        (("--query", photos / "nothing.jpg"), "image"),
        (("--query", photos / "Thumbs.db"), "image"),
    ):
        code, out, _, error = run_command("search", features, *words)
        assert code in (1, 2) and error.what.startswith(what) and out == "", error
        assert "--skip-bad" not in error.fix, "an option of another command"
    assert not list(tmp_path.iterdir())
    for path in (photos, photos / "Thumbs.db"):
        code, _, _, error = run_command("search", path, "--row", 0)
        assert code == 2 and error.what == f"features {path}", "there is no option --to to correct"
    with pytest.raises(DataError):
        embeddings.read(tmp_path / "e.parquet")
