"""Output folders that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterable, Iterator

from etils.epath import Path

from lwd_jax import files
from lwd_jax.errors import UserError
from lwd_jax.files import absolute, in_bucket, is_empty, locate


def check_free(
    folder: str | os.PathLike, overwrite: bool, marker: str, reads: Iterable[str | os.PathLike] = ()
) -> None:
    """A UserError when an output folder is taken.

    Args:
      folder: where the result is to go; not there, or empty.
      overwrite: it may also be there, if it holds `marker`, the file by which an earlier result is known. Anything else
        (a home folder, a typo) is never deleted.
      marker: a file name.
      reads: files and folders that the command reads, "" = none: they must not lie in what is overwritten.
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
    inside = [os.fspath(name) for name in reads if name and _lies_in(name, folder)]
    if inside:
        raise UserError(f"{folder} is not overwritten: '{inside[0]}', which this command reads, lies in it.")


def _lies_in(name: str | os.PathLike, folder: Path) -> bool:
    """Whether a file or folder is `folder` or lies in it, wherever links lead."""
    place, whole = (path if in_bucket(path) else os.path.realpath(path) for path in map(os.fspath, (name, folder)))
    return f"{place.rstrip('/')}/".startswith(f"{whole.rstrip('/')}/")


@contextlib.contextmanager
def staged(
    folder: str | os.PathLike, overwrite: bool, marker: str, reads: Iterable[str | os.PathLike] = ()
) -> Iterator[Path]:
    """A temporary folder to write into; it takes the place of `folder` when the block ends without an error.

    An earlier result stays until the new one is whole, and, on a disk, comes back where it cannot be replaced.

    Args: as `check_free`, which is asked first.

    Yields:
      The empty folder, on a disk.
    """
    check_free(folder, overwrite, marker, reads)
    with files.staged(absolute(locate(folder)), marker) as partial:
        yield partial
