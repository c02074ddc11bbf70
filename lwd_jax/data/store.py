"""An append-only store of records found by their keys: what a long encoding run can be killed in, and continued.

The store is a folder of numbered parts. A part is a complete TFDS dataset with the keys of its records; it is written
under a temporary name and renamed, so a part that is there is whole.
"""

import json
import re
import time
from collections.abc import Iterable

import numpy as np
from etils.epath import Path

from lwd_jax.data.records import Records, check_described, write_records
from lwd_jax.errors import read_json
from lwd_jax.files import staged

KEYS = "keys.json"
PART_BYTES = 1 << 29  # of arrays held in memory before they are written as a part
PART_RECORDS = 1024
_PART = re.compile(r"part-\d{6}")


class Store:
    """Records by key; new ones wait in memory until `flush`, or until there are many, or `seconds` have passed.

    Attributes:
      keys: key -> (part, row), of written records and those waiting.
    """

    def __init__(self, folder: Path, name: str, features: dict, seconds: float):
        self.folder, self.name, self.features, self.seconds = folder, name, features, seconds
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():
            if leftover.suffix == ".partial":
                leftover.rmtree()
        self.keys: dict[str, tuple[int, int]] = {}
        self._part = 0
        for part in existing_parts(folder):
            keys = read_json(folder / part_name(part) / KEYS, list)
            self.keys |= {key: (part, row) for row, key in enumerate(keys)}
            self._part = part + 1
        self._waiting: dict[str, dict] = {}
        self._bytes = 0
        self._since = time.monotonic()

    def add(self, key: str, record: dict) -> None:
        self.keys[key] = (self._part, len(self._waiting))
        self._waiting[key] = record
        self._bytes += sum(value.nbytes for value in record.values() if isinstance(value, np.ndarray))
        late = time.monotonic() - self._since >= self.seconds
        if late or self._bytes >= PART_BYTES or len(self._waiting) >= PART_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as a new part."""
        if self._waiting:
            with staged(self.folder / part_name(self._part)) as folder:
                write_records(folder, self.name, self.features, self._waiting.values())
                (folder / KEYS).write_text(json.dumps(list(self._waiting)))
            self._part += 1
        self._waiting, self._bytes, self._since = {}, 0, time.monotonic()

    def prune(self, live: Iterable[int]) -> None:
        """Deletes the parts that are not `live`."""
        for part in set(existing_parts(self.folder)) - set(live):
            (self.folder / part_name(part)).rmtree()


def part_name(part: int) -> str:
    return f"part-{part:06d}"


def existing_parts(folder: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in folder.iterdir() if _PART.fullmatch(path.name))


def is_store(folder: Path) -> bool:
    """Whether a folder holds parts of a store, also half-written ones, and nothing else."""
    return folder.is_dir() and all(
        path.is_dir() and (path.suffix == ".partial" or _PART.fullmatch(path.name)) for path in folder.iterdir()
    )


class Parts:
    """Random access by (part, row), for reading; picklable."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[int, Records] = {}

    def __getitem__(self, place: tuple[int, int]) -> dict:
        part, row = map(int, place)
        if part not in self._open:
            self._open[part] = Records(self.folder / part_name(part))
        return self._open[part][row]

    def check(self, parts: Iterable[int]) -> None:
        """Tells now what is wrong with the descriptions of parts, not when a record is needed.

        Raises:
          UserError: of `check_described`.
        """
        for part in set(map(int, parts)):
            check_described(self.folder / part_name(part))
