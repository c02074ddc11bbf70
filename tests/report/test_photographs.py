"""The quickstart's photographs: there without a download, cut the same way each time, never squeezed."""

import errno

import numpy as np
import pytest
from etils.epath.gpath import PosixGPath as Path
from PIL import Image

from lwd_jax.errors import UserError
from lwd_jax.report.photographs import MOST, crop, own, shipped, write_crops


def test_shipped_photographs_are_there_in_colour():
    found = shipped()
    assert len(found) == 8 and len({p.caption for p in found}) == 8
    for photograph in found:
        picture = photograph.load()
        assert picture.dtype == np.uint8 and picture.shape[2] == 3 and min(picture.shape[:2]) >= 300
        assert np.ptp(picture, axis=-1).max() > 50, f"{photograph.name} is grey"


def test_crop_takes_the_place_it_is_told():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, 300)
    left, right = (crop(picture, 0.5, (0.5, at), 50)[..., 0] for at in (0, 1))
    assert left.max() <= 50 and right.min() >= 205
    np.testing.assert_allclose(np.diff(crop(picture, 1, (0, 0.5), 100)[0, :, 0].astype(float)).mean(), 0.86, atol=0.03)


def test_crops_are_the_same_each_time(tmp_path):
    photographs = shipped()[:3]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        assert write_crops(photographs, tmp_path / folder, 7, 32) == 9
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(names) == 18
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Image.open(tmp_path / "a/coffee_002.png").size == (32, 32)
    assert (tmp_path / "a/coffee_002.txt").read_text() == photographs[1].caption + "\n"


def test_own_photographs_are_captioned_by_file_or_by_name(tmp_path):
    (tmp_path / "trip").mkdir()
    for name in ("red_boat-2", "trip/lake"):
        Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "trip/lake.txt").write_text("a lake in the morning\n")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = {p.name: p.caption for p in own(tmp_path)}
    assert found == {"red_boat-2": "red boat 2", "trip_lake": "a lake in the morning"}


def test_every_photograph_keeps_its_own_squares_whatever_its_name(tmp_path):
    names = ("holiday.2024.jpg", "holiday.2025.jpg", "a.jpg", "a.png", "A.webp", "a_b.png", "a/b.png", "a~2.png")
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)).save(tmp_path / "in" / name)
    photographs = own(tmp_path / "in")
    assert len({photograph.name.casefold() for photograph in photographs}) == len(names)
    assert {"holiday.2024", "holiday.2025", "a_b"} <= {photograph.name for photograph in photographs}
    out = tmp_path / "out"
    out.mkdir()
    count = write_crops(photographs, out, 2 * len(names), 16)
    pictures = sorted(out.glob("*.png"))
    assert count == len(pictures) == 2 * len(names) == len(list(out.glob("*.txt")))
    assert all(picture.with_name(f"{picture.name.removesuffix('.png')}.txt").is_file() for picture in pictures)
    assert len({np.asarray(Image.open(picture)).mean().round() for picture in pictures}) == len(names)


def test_an_unreadable_photograph_is_passed_over_or_named(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / name)
    read = Path.read_bytes

    def refuse(path):  # chmod would not keep root from reading
        if path.name in refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused = {"a.png"}
    assert [photograph.name for photograph in own(tmp_path)] == ["b"]
    refused = {"a.png", "b.png"}
    with pytest.raises(UserError, match="b.png: cannot be read: Permission denied"):
        own(tmp_path)


def test_a_large_folder_is_thinned_evenly(tmp_path):
    for number in range(MOST * 2):
        Image.fromarray(np.full((20, 20, 3), number, np.uint8)).save(tmp_path / f"{number:03d}.png")
    found = [int(p.name) for p in own(tmp_path)]
    assert len(found) == MOST and found[0] == 0 and found[-1] == MOST * 2 - 1 and set(np.diff(found)) <= {2, 3}


def test_a_folder_without_a_usable_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        own(tmp_path / "missing")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="None of the pictures .* broken.jpg"):
        own(tmp_path)
