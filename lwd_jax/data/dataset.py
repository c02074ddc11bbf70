"""The one dataset format: standard pictures with their captions.

A dataset is a folder that tensorflow-datasets reads (`tfds.builder_from_directory`), and beside it `index.npz` (sizes,
hashes and captions of all records, for which no picture need be read) and `prepared.json` (what was left out, and why).
"""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils.epath import Path

from lwd_jax.data.pictures import SUFFIXES, Rejected, Standard, standardise
from lwd_jax.data.records import Records, write_records
from lwd_jax.errors import UserError
from lwd_jax.files import files_in, is_empty, on_disk, staged

NAME = "pictures"
INDEX = "index.npz"
CAPTIONS = "captions"  # in the index: JSON, a list for each record
REPORT = "prepared.json"
READERS = 4  # pictures that are decoded at a time, in threads
log = logging.getLogger(__name__)


class Example(NamedTuple):
    """One record.

    Attributes:
      picture: encoded, standard (upright 8-bit sRGB JPEG or PNG).
      captions: alternatives, may be ().
      name: of the file it came from, relative to its folder.
    """

    picture: bytes
    captions: tuple[str, ...]
    name: str


class Dataset:
    """Random access to the records of a dataset, in their order.

    Attributes:
      heights, widths: [N] int, px.
      sha256: [N] hashes of the encoded pictures, hexadecimal, as bytes.
    """

    def __init__(self, folder: Path):
        with (folder / INDEX).open("rb") as file, np.load(file) as index:
            self.heights, self.widths, self.sha256 = index["heights"], index["widths"], index["sha256"].astype("S64")
        self.folder = folder
        self._records = Records(folder, undecoded=("picture",))
        if len(self._records) != len(self):
            raise UserError(f"{INDEX} tells of {len(self)} pictures, but there are {len(self._records)}")

    def __len__(self) -> int:
        return len(self.heights)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        captions = tuple(caption.decode() for caption in record["captions"])
        return Example(record["picture"], captions, record["name"].decode())

    def captions(self) -> list[tuple[str, ...]]:
        """Those of every record, without reading the pictures (of a dataset without them in its index, with them)."""
        with (self.folder / INDEX).open("rb") as file, np.load(file) as index:
            if CAPTIONS not in index.files:
                return [self[number].captions for number in range(len(self))]
            return [tuple(captions) for captions in json.loads(index[CAPTIONS].tobytes())]


def open_dataset(folder: str | os.PathLike) -> Dataset:
    """The dataset that `lwd prepare` wrote into `folder`.

    Raises:
      UserError: there is no such folder, or it is something else.
    """
    folder = on_disk(folder, "A dataset")
    if not folder.is_dir():
        raise UserError(f"There is no dataset folder '{folder}'.")
    if not (folder / INDEX).is_file():
        raise UserError(f"'{folder}' is not a dataset: it has no {INDEX}; make one with lwd prepare.")
    try:
        return Dataset(folder)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"'{folder}' is damaged ({error}); make it again with lwd prepare --overwrite.") from error


def held_out(sha256: np.ndarray, count: int) -> np.ndarray:
    """The numbers of the `count` records kept from training: those with the largest content hashes, by hash.

    The choice depends on the pictures alone, so it is the same in a dataset and in the latents made of it.

    Raises:
      UserError: nothing would be left to train on.
    """
    if count >= len(sha256):
        raise UserError(
            f"data.held_out is {count}, but there are only {len(sha256)} pictures: none would be left to train on."
        )
    return np.argsort(sha256, kind="stable")[len(sha256) - count :]


def find_pictures(folder: str | os.PathLike) -> list[Path]:
    """All picture files under a folder, sorted by their path. Of links to folders, which are not followed, it warns.

    Raises:
      UserError: there is no such folder, or no picture in it.
    """
    root = on_disk(folder, "The folder of pictures")
    if not root.is_dir():
        raise UserError(f"There is no folder '{folder}'.")
    found = [path for path in files_in(root) if path.suffix.lower() in SUFFIXES]
    inside = (os.path.join(parent, name) for parent, folders, _ in os.walk(root) for name in folders)
    links = [path for path in inside if os.path.islink(path)]
    if links:
        log.warning("%d links to folders are passed by, such as '%s': give them as --images.", len(links), links[0])
    if not found:
        raise UserError(f"There are no pictures in '{folder}' (known: {', '.join(sorted(SUFFIXES))}).")
    return found


class Summary(NamedTuple):
    """What became of a folder of pictures."""

    heights: list[int]
    widths: list[int]
    uncaptioned: list[str]  # names of pictures that were taken without a caption
    rejects: list[tuple[str, str]]  # (name, reason)
    reencoded: int  # pictures that were not standard, and are now PNG


def _standards(paths: list[Path]) -> Iterator[tuple[Path, Standard | str]]:
    """Each picture's standard form, or the reason why it has none; a few ahead, in order."""

    def one(path: Path) -> Standard | str:
        try:
            return standardise(path.read_bytes())
        except Rejected as rejected:
            return str(rejected)
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    with ThreadPoolExecutor(READERS) as pool:
        waiting = []
        for path in paths:
            waiting.append((path, pool.submit(one, path)))
            if len(waiting) > 2 * READERS:
                first, future = waiting.pop(0)
                yield first, future.result()
        for path, future in waiting:
            yield path, future.result()


def _rows(root: Path, paths, captions, summary: Summary, index: dict, on_progress) -> Iterator[dict]:
    """The records to write; fills in `summary` and `index` on the way."""
    seen: dict[str, tuple[str, bool]] = {}  # by pixels, the first picture and whether it has a caption
    captions_of = dict(zip(paths, captions))
    for done, (path, standard) in enumerate(_standards(paths), start=1):
        on_progress(done, len(paths))
        name = os.fsencode(path.relative_to(root).as_posix()).decode(errors="backslashreplace")
        if isinstance(standard, str):
            summary.rejects.append((name, standard))
            continue
        if standard.pixels in seen:
            first, told = seen[standard.pixels]
            better = ", which has no caption: remove that one" if captions_of[path] and not told else ""
            summary.rejects.append((name, f"the same picture as {first}{better}"))
            continue
        seen[standard.pixels] = (name, bool(captions_of[path]))
        if not captions_of[path]:
            summary.uncaptioned.append(name)
        summary.heights.append(standard.height)
        summary.widths.append(standard.width)
        index["sha256"].append(hashlib.sha256(standard.data).hexdigest())
        index[CAPTIONS].append(captions_of[path])
        index["reencoded"] += standard.reencoded
        yield {"picture": standard.data, "captions": list(captions_of[path]), "name": name}


def write_dataset(
    out: str | os.PathLike,
    root: str | os.PathLike,
    paths: list[Path],
    captions: list[tuple[str, ...]],
    on_progress: Callable[[int, int], None],
) -> Summary:
    """Writes the pictures, in the given order, as a dataset; it appears whole or not at all, and replaces an older one.

    Unreadable pictures and pictures whose pixels were seen before are left out.

    Args:
      root: what the names of the records are relative to.
      paths, captions: of equal length.
      on_progress: called with (pictures done, pictures in all).

    Raises:
      UserError: `out` exists and is no dataset; or no picture can be used.
    """
    out, root = on_disk(out, "A dataset").absolute(), Path(root)
    if out.exists() and not (out / INDEX).is_file() and (not out.is_dir() or not is_empty(out)):
        raise UserError(f"'{out}' exists and is not a dataset; choose another --out.")
    features = {
        "picture": tfds.features.Image(shape=(None, None, 3)),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "name": tfds.features.Text(),
    }
    summary, index = Summary([], [], [], [], 0), {"sha256": [], CAPTIONS: [], "reencoded": 0}
    with staged(out) as folder:
        write_records(folder, NAME, features, _rows(root, paths, captions, summary, index, on_progress))
        if not summary.heights:
            name, reason = summary.rejects[0]
            raise UserError(f"None of the {len(paths)} pictures in '{root}' can be used; the first, {name}: {reason}.")
        summary = summary._replace(reencoded=index["reencoded"])
        sizes = {"heights": np.array(summary.heights, np.int64), "widths": np.array(summary.widths, np.int64)}
        told = np.frombuffer(json.dumps(index[CAPTIONS]).encode(), np.uint8)
        np.savez(folder / INDEX, sha256=np.array(index["sha256"], "S64"), **{CAPTIONS: told}, **sizes)
        left_out = {"rejects": summary.rejects, "without_caption": summary.uncaptioned}
        (folder / REPORT).write_text(json.dumps(left_out, indent=1, ensure_ascii=False), encoding="utf-8")
    return summary
