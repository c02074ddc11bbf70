"""Where a file lies that somebody names: on a disk, or in a bucket under a gs:// address.

Whatever the project opens, it opens through `etils.epath`, and a name becomes a Path here. A bucket has objects, not
files: they are written whole, neither appended to nor renamed, and folders are but parts of their names. What follows
from that is here too, so that nothing else asks where it writes.
"""

import fcntl
import functools
import importlib.util
import logging
import os
import shutil
import signal
import tempfile
import threading
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import fsspec
from etils.epath import Path

from lwd_jax.errors import UserError

log = logging.getLogger(__name__)
_SCHEME = "gs://"
_BLOCK = 1 << 22
_READERS = 8

# Orbax's own writes, and other hosts', pass the client by: what it remembers of folders would be out of date. A process
# has one client, which whoever needs it first makes: this stands before any.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether this is an address in a bucket."""
    return os.fspath(path).startswith(_SCHEME)


@functools.cache
def _reach(address: str) -> None:
    """Asks once whether a bucket answers. Later its client would take no answer, and a refusal, for "not there": a run
    would not find its checkpoints, and begin again.
    """
    client, log = fsspec.filesystem("gcs"), logging.getLogger("gcsfs")
    level = log.level
    log.setLevel(logging.CRITICAL)  # pages of tracebacks: the sentence says why
    try:
        client.ls(address)
    except FileNotFoundError:
        pass
    except Exception as error:  # of the network, of credentials, of the service: each library has its own
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{address}' cannot be reached: {why}.") from error
    finally:
        log.setLevel(level)


def locate(name: str | os.PathLike) -> Path:
    """The Path of a file or folder that somebody named. Nothing is opened, but a bucket is asked whether it answers.

    Raises:
      UserError: an address that is not gs://BUCKET/... or cannot be reached, or the extra [gcs] is not installed.
    """
    text = os.fspath(name)
    if not text:
        raise UserError("The name of a file or folder is empty.")
    if "://" not in text:
        return Path(text)
    if not text.removeprefix(_SCHEME).strip("/") or not in_bucket(text):
        raise UserError(f"'{text}' is no address that can be opened: name a folder, or gs://BUCKET/FOLDER.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"'{text}' is in a bucket, which needs the extra [gcs]: pip install 'lwd_jax[gcs]'.")
    _reach(text)
    return Path(text)


def on_disk(name: str | os.PathLike, what: str) -> Path:
    """As `locate`, of what is read or written by libraries that open files themselves.

    Args:
      name: the file or folder.
      what: it is, for the sentence.

    Raises:
      UserError: it is an address.
    """
    if "://" in os.fspath(name):
        raise UserError(
            f"{what} must be on a disk, but '{os.fspath(name)}' is an address: mount the bucket (gcsfuse does) and "
            "give its place there, or copy it here."
        )
    return locate(name)


def absolute(path: Path) -> Path:
    """`path.absolute()`, which would take an address for a folder right here."""
    return path if in_bucket(path) else path.absolute()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or is not there. (`iterdir` does not show files named NAME~.)"""
    return not any(folders or names for _, folders, names in folder.walk())


def _objects(folder: Path) -> dict[Path, int]:
    """The size in bytes of every object under an address, by one question and not one for each.

    An object whose name ends in / is how some programs make a folder.
    """
    found = fsspec.filesystem("gcs").find(os.fspath(folder), detail=True)
    return {Path(_SCHEME + name): about["size"] for name, about in found.items() if not name.endswith("/")}


def files_in(folder: Path) -> list[Path]:
    """Every file in a folder and its folders, in order; [] of one that is not there. Links to folders are passed by."""
    if in_bucket(folder):
        return sorted(_objects(folder))
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            found.append(path)
        elif not os.path.islink(path):
            found += files_in(path)
    return sorted(found)


def _checksum(path: Path) -> tuple[int, int]:
    size, value = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, value = size + len(block), zlib.crc32(block, value)
    return size, value


def checksums(folder: Path) -> dict[str, tuple[int, int | None]]:
    """What tells whether the files in a folder are as they were written: by name, the size in bytes and the CRC-32.

    Of an object the CRC is None: a bucket keeps one of its own and looks after its bytes, and to read a checkpoint back
    through one process would take longer than writing it from all.
    """
    if in_bucket(folder):
        return {str(path.relative_to(folder)): (size, None) for path, size in sorted(_objects(folder).items())}
    paths = files_in(folder)
    with ThreadPoolExecutor(_READERS) as pool:  # one file at a time is a gigabyte a second, whatever the disk can do
        sums = list(pool.map(_checksum, paths))
    return {str(path.relative_to(folder)): found for path, found in zip(paths, sums)}


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or as it was before: on a disk it is renamed into place; objects are so anyway.

    Raises:
      OSError: it cannot be written; nothing is left of it.
    """
    if in_bucket(path):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where this package keeps what it can make again: $XDG_CACHE_HOME/lwd_jax, or ~/.cache/lwd_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lwd_jax"


class Spool:
    """A folder to append to, as a bucket does not allow.

    Attributes:
      here: the folder itself; of one in a bucket a temporary folder on this machine, whose files `push` copies there.
    """

    def __init__(self, folder: Path):
        self._folder, self._pushed = folder, {}
        self._temporary = tempfile.TemporaryDirectory(prefix="lwd-spool-") if in_bucket(folder) else None
        self.here = Path(self._temporary.name) if self._temporary else folder

    def push(self) -> None:
        """Copies the files that have grown."""
        for path in files_in(self.here) if self._temporary else ():
            content = path.read_bytes()
            if self._pushed.get(path) != len(content):
                (self._folder / path.relative_to(self.here)).write_bytes(content)
                self._pushed[path] = len(content)

    def close(self) -> None:
        """Copies what is left, and removes the temporary folder."""
        self.push()
        if self._temporary is not None:
            self._temporary.cleanup()


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """While the block runs, no other process is in a block like it: a lock on the file .lock in a folder that is there,
    which the system lets go of when this process ends, however it ends. Where there are no locks (in a bucket, on some
    network file systems) nothing is held, and of a disk without them a warning says so.

    Args:
      folder: what is written to.
      what: it is, for the sentence.

    Raises:
      UserError: another process is in such a block.
    """
    if in_bucket(folder):
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            raise UserError(f"{what} is being written to by another process; wait for it to end.") from taken
        except OSError as error:
            log.warning("'%s' cannot be locked (%s): see that no other process writes to it.", folder, error.strerror)
        yield


@contextmanager
def cleared_up() -> Iterator[None]:
    """A first SIGTERM inside ends the block as an error would, so that nothing half-written stays; where the signal has
    a handler (in `lwd train`, which saves instead) that stays. It waits for a call of another language to return.
    """

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # only it may
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def staged(target: Path, last: str = "") -> Iterator[Path]:
    """A temporary folder on a disk that becomes `target` when the block ends well, and vanishes when it does not.

    On a disk it is a sibling that is renamed. Into a bucket it is copied, over what was there: `last` (the file by
    which a whole result is known) first goes and last comes, so that half a result has none.
    """
    with cleared_up():
        if in_bucket(target):
            with tempfile.TemporaryDirectory(prefix="lwd-staged-") as temporary:
                yield Path(temporary)
                _copy(Path(temporary), target, last)
            return
        with _renamed(target) as temporary:
            yield temporary


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    temporary.mkdir()
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(folder: Path, target: Path, last: str) -> None:
    if target.exists():
        (target / last).unlink(missing_ok=True)
        target.rmtree()
    for path in sorted(files_in(folder), key=lambda path: path == folder / last):
        path.copy(target / path.relative_to(folder))
