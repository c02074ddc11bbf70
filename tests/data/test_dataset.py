"""Laws of the dataset format."""

import json
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from full_disk import full_disk
from PIL import Image

from lwd_jax.data import records
from lwd_jax.data.dataset import find_pictures, held_out, open_dataset, write_dataset
from lwd_jax.data.records import STORAGE, pack, unpack
from lwd_jax.errors import UserError
from lwd_jax.files import staged


def quiet(*_):
    pass


def save_pictures(folder, count, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        shape = [(40, 60, 3), (61, 40, 3), (48, 48, 3)][i % 3]
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"p{i:02}.png")
    return find_pictures(folder)


@pytest.fixture
def folder(tmp_path):
    save_pictures(tmp_path / "images", 7)
    return tmp_path


def write(folder, out="dataset", captions=None):
    paths = find_pictures(folder / "images")
    captions = captions or [("first", f"größer {i}") if i else () for i in range(len(paths))]
    return write_dataset(folder / out, folder / "images", paths, captions, quiet)


def test_there_and_back(folder, monkeypatch):
    monkeypatch.setattr(records, "RECORDS_PER_FILE", 3)  # several files
    monkeypatch.setattr(records, "RECORDS_PER_CALL", 2)
    summary = write(folder)
    dataset = open_dataset(folder / "dataset")
    assert len(dataset) == 7 and summary.uncaptioned == ["p00.png"]
    for i, path in enumerate(find_pictures(folder / "images")):
        example = dataset[i]
        assert example.picture == path.read_bytes() and example.name == path.name
        assert example.captions == (("first", f"größer {i}") if i else ())
        assert (dataset.heights[i], dataset.widths[i]) == Image.open(path).size[::-1]
    assert len(list((folder / "dataset").glob("*.array_record*"))) == 3
    assert not list(folder.glob(".*"))


def test_others_read_it_through_tfds_without_tensorflow(folder):
    write(folder)
    source = tfds.builder_from_directory(folder / "dataset").as_data_source("train")
    assert len(source) == 7 and (source[2]["picture"] == np.asarray(Image.open(folder / "images" / "p02.png"))).all()
    assert "tensorflow" not in sys.modules


def test_duplicates_and_unreadable_pictures_are_left_out_and_listed(folder):
    Image.open(folder / "images" / "p01.png").save(folder / "images" / "q.bmp")
    (folder / "images" / "broken.jpg").write_bytes(b"no")
    summary = write(folder)
    assert dict(summary.rejects).keys() == {"q.bmp", "broken.jpg"} and "p01.png" in dict(summary.rejects)["q.bmp"]
    report = json.loads((folder / "dataset" / "prepared.json").read_text())
    assert report["rejects"] == [list(reject) for reject in summary.rejects]
    assert len(open_dataset(folder / "dataset")) == 7


def test_a_full_disk_is_told_and_leaves_nothing(folder):
    with full_disk(10_000), pytest.raises(UserError, match="records in .* cannot be written"):
        write(folder)
    assert [path.name for path in folder.iterdir()] == ["images"]


def test_links_to_folders_are_told_of(folder, caplog):
    (folder / "images" / "sub").mkdir()
    find_pictures(folder / "images")
    assert not caplog.messages
    save_pictures(folder / "elsewhere", 1)
    (folder / "images" / "sub" / "link").symlink_to(folder / "elsewhere")
    assert len(find_pictures(folder / "images")) == 7
    assert "1 links to folders are passed by, such as" in caplog.text and "sub/link" in caplog.text


def test_of_copies_the_first_is_kept_and_a_caption_of_another_is_told(folder):
    Image.open(folder / "images" / "p03.png").save(folder / "images" / "q.bmp")
    captions = [("of the copy",) if path.name == "q.bmp" else () for path in find_pictures(folder / "images")]
    summary = write(folder, captions=captions)
    assert summary.rejects == [("q.bmp", "the same picture as p03.png, which has no caption: remove that one")]
    assert open_dataset(folder / "dataset").captions() == [()] * 7
    (folder / "images" / "p03.png").unlink()
    write(folder, captions=captions[:3] + captions[4:])
    assert open_dataset(folder / "dataset").captions() == [()] * 6 + [("of the copy",)]


def test_a_name_that_is_not_unicode(folder):
    images = os.fsencode(folder / "images")
    os.rename(images + b"/p00.png", images + b"/p\xff.png")
    write(folder)
    dataset = open_dataset(folder / "dataset")
    assert "p\\xff.png" in {dataset[number].name for number in range(7)}


def test_the_same_folder_gives_the_same_dataset(folder):
    write(folder, "one")
    write(folder, "two")
    one, two = open_dataset(folder / "one"), open_dataset(folder / "two")
    assert [one[i] for i in range(7)] == [two[i] for i in range(7)] and (one.sha256 == two.sha256).all()


def test_a_dataset_is_replaced_whole(folder):
    write(folder)
    (folder / "images" / "p00.png").unlink()
    write(folder)
    assert len(open_dataset(folder / "dataset")) == 6 and len(list(folder.iterdir())) == 2


def test_nothing_half_written(folder, monkeypatch):
    write(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("lwd_jax.data.dataset.standardise", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(folder)
    assert sorted(folder.rglob("*")) == before and len(open_dataset(folder / "dataset")) == 7


def test_staged_gives_back_what_was_there_when_renaming_fails(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OSError), staged(tmp_path / "out") as folder:
        folder.rmdir()
    assert (tmp_path / "out" / "old").exists() and len(list(tmp_path.iterdir())) == 1


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        find_pictures(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        find_pictures(tmp_path / "empty")
    with pytest.raises(UserError, match="no dataset folder"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(UserError, match="lwd prepare"):
        open_dataset(tmp_path / "images")
    with pytest.raises(UserError, match="not a dataset"):
        write_dataset(folder / "images", folder / "images", find_pictures(folder / "images"), [()] * 7, quiet)
    assert len(find_pictures(folder / "images")) == 7
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"x")
    with pytest.raises(UserError, match="None of the 1 pictures.*x.png"):
        write_dataset(tmp_path / "out", tmp_path / "bad", find_pictures(tmp_path / "bad"), [()], quiet)
    assert not (tmp_path / "out").exists()


def test_held_out_depends_on_content_alone():
    hashes = np.array([f"{i:064x}" for i in (5, 1, 9, 3, 7)])
    assert held_out(hashes, 2).tolist() == [4, 2] and held_out(hashes, 0).tolist() == []
    shuffled = np.random.default_rng(0).permutation(5)
    assert set(hashes[shuffled][held_out(hashes[shuffled], 3)]) == set(hashes[held_out(hashes, 3)])
    with pytest.raises(UserError, match="held_out is 5"):
        held_out(hashes, 5)


@pytest.mark.parametrize("storage", STORAGE)
def test_packing_rounds_as_the_type_does(storage):
    values = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32) * 20
    stored = pack(values, storage)
    assert stored.dtype == (np.float32 if storage == "float32" else np.uint16)
    assert (unpack(stored, storage) == values.astype(STORAGE[storage]).astype(np.float32)).all()
    bound = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0}[storage]
    assert (np.abs(unpack(stored, storage) - values) <= bound * np.abs(values)).all()
