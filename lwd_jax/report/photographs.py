"""The quickstart's pictures: photographs that ship with scikit-image and scikit-learn, or one's own, cut into squares.

A model as small as the quickstart's learns from many views of few photographs: each is cut at several places and sizes.
"""

import importlib.util
import io
import itertools
import os
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from etils.epath import Path
from PIL import Image

from lwd_jax.data.captions import find_captions
from lwd_jax.data.dataset import find_pictures
from lwd_jax.data.pictures import Rejected, standardise
from lwd_jax.errors import UserError
from lwd_jax.files import on_disk

SMALLEST_CROP = 0.6  # of the photograph's short side; the largest is all of it
MOST = 48  # photographs of one's own that are taken, spread evenly over the folder


class Photograph(NamedTuple):
    name: str
    caption: str
    load: Callable[[], np.ndarray]  # -> uint8 [H W 3]


class Shipped(NamedTuple):
    """A photograph in the wheel of a dependency; `package` / `file` is where."""

    package: str
    file: str
    caption: str
    credit: str


_SKIMAGE, _SKLEARN = "skimage", "sklearn"
SHIPPED = (
    Shipped(
        _SKIMAGE, "data/astronaut.png", "a smiling astronaut in an orange suit before a flag", "NASA, public domain"
    ),
    Shipped(_SKIMAGE, "data/coffee.png", "a red cup of coffee on a wooden table", "Rachel Michetti, CC0"),
    Shipped(_SKIMAGE, "data/chelsea.png", "a tabby cat looking into the camera", "Stefan van der Walt, CC0"),
    Shipped(_SKIMAGE, "data/rocket.jpg", "a rocket on its launch pad at dusk", "SpaceX, public domain"),
    Shipped(_SKIMAGE, "data/hubble_deep_field.jpg", "galaxies in deep space", "NASA, public domain"),
    Shipped(_SKIMAGE, "data/retina.jpg", "a red human retina with branching vessels", "Mikael Häggström, CC0"),
    Shipped(_SKLEARN, "datasets/images/china.jpg", "a chinese pavilion above a lake", "danielbuechele, CC BY 2.0"),
    Shipped(_SKLEARN, "datasets/images/flower.jpg", "an orange dahlia before dark leaves", "vultilion, CC BY 2.0"),
)


def _rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(standardise(data).data)))


def shipped() -> list[Photograph]:
    """The photographs in the wheels of the dependencies; nothing is downloaded.

    Raises:
      UserError: one is not there, in a version of the dependency that no longer has it.
    """
    found = []
    for row in SHIPPED:
        path = Path(importlib.util.find_spec(row.package).submodule_search_locations[0]) / row.file
        if not path.is_file():
            raise UserError(
                f"The installed {row.package} has no {row.file}; give photographs of your own with --images."
            )
        found.append(Photograph(path.stem, row.caption, lambda path=path: _rgb(path.read_bytes())))
    return found


def unique(name: str, taken: Collection[str]) -> str:
    """`name`, or with a number behind it where it is taken; letter case does not tell names apart."""
    known = {each.casefold() for each in taken}
    numbered = (name if count == 1 else f"{name}~{count}" for count in itertools.count(1))
    return next(each for each in numbered if each.casefold() not in known)


def own(folder: str | os.PathLike, without: Path | None = None) -> list[Photograph]:
    """The photographs of a folder, with their captions as `lwd prepare` finds them, or else the words of the file's
    name. Their names are those of the files, made unique.

    Args:
      folder: is searched with its folders.
      without: a folder in it that is left out, such as the one that is written to.

    Raises:
      UserError: no such folder, or no readable picture in it.
    """
    folder = on_disk(folder, "The folder of photographs")
    paths = find_pictures(folder)
    if without is not None:
        paths = [path for path in paths if not path.absolute().is_relative_to(without.absolute())]
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(MOST, len(paths))).astype(int))]
    found, names, reason = [], [], ""
    for path, captions in zip(paths, find_captions(folder, paths)):
        try:
            standardise(path.read_bytes())
        except Rejected as rejected:
            reason = f"{path.name}: {rejected}"
            continue
        except OSError as error:
            reason = f"{path.name}: cannot be read: {error.strerror}"
            continue
        caption = captions[0] if captions else " ".join(path.stem.replace("_", " ").replace("-", " ").split())
        names.append(unique("_".join((*path.relative_to(folder).parent.parts, path.stem)), names))
        found.append(Photograph(names[-1], caption, lambda path=path: _rgb(path.read_bytes())))
    if not found:
        raise UserError(f"None of the pictures in '{folder}' can be used; {reason}.")
    return found


def crop(picture: np.ndarray, share: float, place: tuple[float, float], side: int) -> np.ndarray:
    """A square of `share` of the short side at `place` in [0, 1]^2, scaled to side x side px."""
    height, width = picture.shape[:2]
    size = max(1, round(share * min(height, width)))
    top, left = (round(at * (extent - size)) for at, extent in zip(place, (height, width)))
    square = Image.fromarray(picture[top : top + size, left : left + size])
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def write_crops(photographs: list[Photograph], folder: Path, total: int, side: int, seed: int = 0) -> int:
    """Writes about `total` squares of side x side px with a .txt caption each; how many.

    The first of each photograph is its largest, from the centre; the others lie anywhere. The same arguments write the
    same squares.

    Args:
      folder: an empty folder.
    """
    each = -(-total // len(photographs))
    for number, photograph in enumerate(photographs):
        picture, rng = photograph.load(), np.random.default_rng([seed, number])
        for view in range(each):
            share, place = 1.0, (0.5, 0.5)
            if view:
                share, place = rng.uniform(SMALLEST_CROP, 1), tuple(rng.uniform(size=2))
            name = f"{photograph.name}_{view:03d}"  # no Path.with_suffix: a dot in the name is part of it
            Image.fromarray(crop(picture, share, place, side)).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(photograph.caption + "\n", encoding="utf-8")
    return each * len(photographs)
