"""Folders of records: ArrayRecord files written and read through tensorflow-datasets, without TensorFlow.

Traps of TFDS without TensorFlow: a picture goes in as encoded bytes and comes out so with SkipDecoding; a tensor of
more than one unknown dimension needs encoding="bytes"; 16-bit floats go in as a uint16 view.
"""

import functools
import itertools
import os
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from etils.epath import Path
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core import dataset_info, sequential_writer

from lwd_jax.errors import UserError, read_json

SPLIT = "train"
DESCRIPTIONS = ("dataset_info.json", "features.json")  # what TFDS writes beside the records
RECORDS_PER_FILE = 1024
RECORDS_PER_CALL = 32  # the writer rewrites its metadata in each call
STORAGE = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def array(rank: int, dtype) -> tfds.features.Tensor:
    """The feature of an array whose sizes may differ from record to record."""
    return tfds.features.Tensor(shape=(None,) * rank, dtype=np.dtype(dtype), encoding="bytes")


def float_array(rank: int, storage: str) -> tfds.features.Tensor:
    """The feature of what `pack` makes."""
    return array(rank, np.float32 if storage == "float32" else np.uint16)


def pack(values: np.ndarray, storage: str) -> np.ndarray:
    """Floats as they are stored: float32, or the uint16 view of a 16-bit type (a row of STORAGE)."""
    stored = np.ascontiguousarray(values, np.float32).astype(STORAGE[storage])
    return stored if storage == "float32" else stored.view(np.uint16)


def unpack(stored: np.ndarray, storage: str) -> np.ndarray:
    """Inverse of `pack`, up to rounding; float32."""
    return (stored if storage == "float32" else stored.view(STORAGE[storage])).astype(np.float32)


def write_records(folder: Path, name: str, features: dict, rows: Iterable[dict]) -> int:
    """Writes the rows as a TFDS dataset `name` with the one split SPLIT into an existing folder; their number.

    Raises:
      UserError: they cannot be written; is the disk full?
    """
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=os.fspath(folder), module_name=__name__
    )
    info = dataset_info.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features), description=f"{name} of lwd_jax"
    )
    writer = sequential_writer.SequentialWriter(info, RECORDS_PER_FILE, file_format="array_record")
    writer.initialize_splits([SPLIT])
    count, rows = 0, iter(rows)
    try:
        while chunk := list(itertools.islice(rows, RECORDS_PER_CALL)):
            count += len(chunk)
            writer.add_examples({SPLIT: chunk})
        writer.close_all()
    except RuntimeError as error:  # in which ArrayRecord says what the system refused it
        raise UserError(f"The records in {folder} cannot be written ({str(error).split(';')[0]}).") from error
    return count


def check_described(folder: Path) -> None:
    """Raises UserError, with the file's name, where one that describes the records is not there or is cut off."""
    for name in DESCRIPTIONS:
        if not (folder / name).is_file():
            raise UserError(f"There is no {folder / name}.")
        read_json(folder / name)


class Records:
    """Random access to a folder that `write_records` filled. Picklable: a worker process opens its own files.

    Raises, where it is first used, and for each record:
      UserError: a file of records, or one that describes them, is not there, cut off, damaged or something else.
    """

    def __init__(self, folder: Path, undecoded: tuple[str, ...] = ()):
        """`undecoded`: picture features that come out as encoded bytes."""
        self.folder = folder
        self.undecoded = undecoded

    @functools.cached_property
    def _source(self):
        check_described(self.folder)
        decoders = {name: tfds.decode.SkipDecoding() for name in self.undecoded}
        try:
            return tfds.builder_from_directory(os.fspath(self.folder)).as_data_source(SPLIT, decoders=decoders)
        except ParseError as error:
            raise UserError(f"{self.folder / DESCRIPTIONS[0]} does not describe records: {error}.") from error
        except RuntimeError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: RuntimeError) -> UserError:
        """What ArrayRecord says of a file: its first line, without the addresses inside the file."""
        return UserError(f"The records in {self.folder} cannot be read ({str(error).split(';')[0]}).")

    def __getstate__(self):
        return {"folder": self.folder, "undecoded": self.undecoded}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        try:
            return self._source[int(index)]
        except RuntimeError as error:
            raise self._damaged(error) from error
        except (TypeError, ValueError) as error:  # of a file that was cut between its blocks
            raise UserError(f"Record {index} in {self.folder} cannot be read: its file was cut off.") from error
