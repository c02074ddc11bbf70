"""Output folders that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator

from etils.epath import Path

from lwd_jax import files
from lwd_jax.errors import UserError
from lwd_jax.files import absolute, is_empty, locate


def check_free(folder: str | os.PathLike, overwrite: bool, marker: str) -> None:
    """A UserError when an output folder is taken.

    Args:
      folder: where the result is to go; not there, or empty.
      overwrite: it may also be there, if it holds `marker`, the file by which an earlier result is known. Anything else
        (a home folder, a typo) is never deleted.
      marker: a file name.
    """
    folder = locate(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder.")
    if not folder.is_dir() or is_empty(folder):
        return
    if not overwrite:
        raise UserError(f"{folder} exists and is not empty; name a new folder or add --overwrite.")
    if not (folder / marker).is_file():
        raise UserError(f"{folder} is not overwritten: it has no {marker}, so it is no earlier result of this command.")


@contextlib.contextmanager
def staged(folder: str | os.PathLike, overwrite: bool, marker: str) -> Iterator[Path]:
    """A temporary folder to write into; it takes the place of `folder` when the block ends without an error.

    An earlier result stays until the new one is whole, and, on a disk, comes back where it cannot be replaced.

    Args: as `check_free`, which is asked first.

    Yields:
      The empty folder, on a disk.
    """
    check_free(folder, overwrite, marker)
    with files.staged(absolute(locate(folder)), marker) as partial:
        yield partial
