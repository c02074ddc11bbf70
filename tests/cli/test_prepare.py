"""`lwd prepare`: what it prints and writes, and the mistakes it names."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lwd_jax.cli import main
from lwd_jax.data.dataset import open_dataset


def save(path, height=70, width=100, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    save(folder / "a.png", seed=1)
    save(folder / "sub" / "B.JPG", 300, 200, seed=2)
    save(folder / "c.webp", seed=3)
    (folder / "a.txt").write_text("a caption\n")
    return folder


def prepare(images, *more):
    return main(["prepare", "--images", str(images), "--out", str(images.parent / "out"), *more])


def test_it_writes_a_dataset_and_says_what_it_did(images, capsys):
    (images / "broken.png").write_bytes(b"x")
    Image.open(images / "a.png").save(images / "z.tiff")
    assert prepare(images, "--resolution", "128") == 0
    printed = capsys.readouterr().out
    dataset = open_dataset(images.parent / "out")
    assert [dataset[i].name for i in range(len(dataset))] == ["a.png", "c.webp", "sub/B.JPG"]
    assert dataset[0].captions == ("a caption",)
    for word in (
        "160 x 96",
        "96 x 160",
        "broken.png",
        "z.tiff",
        "the same picture as a.png",
        "2 pictures have no caption",
    ):
        assert word in printed, word
    assert "lwd encode" in printed.splitlines()[-1] and "3 of 5 pictures" in printed.splitlines()[-1].replace("\n", " ")


def test_enlarged_pictures_are_counted(images, capsys):
    assert prepare(images, "--resolution", "512") == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if " x " in line and "│" in line]
    assert sum(int(row[2]) for row in rows) == 3 == sum(int(row[3]) for row in rows)


def test_an_earlier_dataset_is_replaced_only_when_asked(images, capsys):
    assert prepare(images, "--resolution", "128") == 0
    (images / "c.webp").unlink()
    assert prepare(images, "--resolution", "128") == 2 and "--overwrite" in capsys.readouterr().err
    assert len(open_dataset(images.parent / "out")) == 3
    assert prepare(images, "--resolution", "128", "--overwrite") == 0
    assert len(open_dataset(images.parent / "out")) == 2
    assert main(["prepare", "--images", str(images), "--out", str(images), "--overwrite"]) == 2
    assert "is not overwritten" in capsys.readouterr().err and (images / "a.png").is_file()


def fails(capsys, images, *more, words):
    assert prepare(images, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("lwd: ") and all(word in error for word in words), error
    assert sorted(path.name for path in images.parent.iterdir() if path != images) == []


def test_mistakes_are_one_sentence(images, tmp_path, capsys):
    fails(capsys, images, "--resolution", "1000", words=["1000", "divide"])
    (images / "a.txt").write_text("\n")
    fails(capsys, images, words=["None of the 3 pictures", "--no-captions"])
    (images / "a.txt").write_bytes(b"\xff\xff")
    fails(capsys, images, words=["a.txt", "UTF-8"])
    for path in images.rglob("*.*"):
        path.unlink()
    fails(capsys, images, words=["no pictures"])
    assert main(["prepare", "--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_command_that_is_told_to_stop_leaves_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    for i in range(60):  # to be brought to PNG, each for a while
        Image.fromarray(noise + np.uint8(i)).save(tmp_path / "images" / f"{i}.bmp")
    words = ["--images", tmp_path / "images", "--out", tmp_path / "out", "--no-captions"]
    with subprocess.Popen([sys.executable, "-m", "lwd_jax.cli", "prepare", *words], stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".out.*.partial")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_no_captions_at_all_is_fine_for_stage_1(images):
    (images / "a.txt").unlink()
    assert prepare(images, "--no-captions") == 0
    assert all(open_dataset(images.parent / "out")[i].captions == () for i in range(3))


def test_a_bomb_alone_leaves_nothing_to_use(images, capsys, monkeypatch):
    monkeypatch.setattr("lwd_jax.data.pictures.PIXEL_LIMIT", 1000)
    fails(capsys, images, words=["None of the 3 pictures", "a.png", "bomb"])
