"""The one exception that is the user's to mend, what raises it everywhere (names and JSON files), and exit codes."""

import difflib
import errno
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils.epath import Path  # haar, saliency and mask need nothing but jax

MISTAKE = 2
TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: launchers run the command again

# Errors of the file system that a wrong path makes, or one that is taken (EAGAIN, of a lock). Of any other the path is
# innocent, and the next try may not meet it.
_OF_PATHS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EAGAIN,
}  # fmt: skip


class UserError(ValueError):
    """A mistake in what was given: one clear sentence. Commands print it and exit with 2, without a traceback."""


class Transient(UserError):
    """No mistake: what went wrong may be gone when the same command is run again. Commands exit with 75."""


# What commands tell in one sentence, without a traceback. JSON: of files that TFDS and Orbax read; our own readers
# name the file.
TOLD = (UserError, OSError, json.JSONDecodeError)


def sentence(error: Exception) -> str:
    """What an error of TOLD says; one of the file system with the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"A file of what was given is not sound JSON (is it cut off?): {error}."
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or str(error) or type(error).__name__
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{files}: {reason}." if files else f"{reason}."


def exit_code(error: BaseException) -> int:
    """What a command ends with, by the error and what it was raised from: TEMPORARY where another try may succeed.

    An OSError without a number is a library's own word for what it was given (a cut picture, a name it does not know).
    """
    while error is not None:
        failed = isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_PATHS
        if failed or isinstance(error, (Transient, ConnectionError, TimeoutError)):
            return TEMPORARY
        error = error.__cause__
    return MISTAKE


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known word nearest to `word`, or the sorted list of all when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}."


def choose(table: dict, name: str, what: str):
    """`table[name]`, or a UserError that says which `what` was meant."""
    if name not in table:
        raise UserError(f"There is no {what} '{name}'.{did_you_mean(name, table)}")
    return table[name]


def no_duplicates(pairs: list[tuple]) -> dict:
    """For `json.loads(object_pairs_hook=...)`, which otherwise takes the last of two entries of one name."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"the name '{next(name for name in names if names.count(name) > 1)}' occurs more than once")
    return result


def read_text(path: "Path") -> str:
    """What a text file holds, a byte order mark left out; lines end with "\\n" alone.

    Raises:
      UserError: it is not UTF-8; with the file's name.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"The file '{path}' is not UTF-8 text.") from error


def read_json(path: "Path", kind: type = dict):
    """What a JSON file holds, which must be of a kind: an object, or an array (list).

    Raises:
      UserError: it is not JSON, is cut off, is of another kind or names something twice; with the file's name.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except ValueError as error:  # a UserError is one
        raise UserError(f"{path} is not sound JSON: {error}.") from error
    if not isinstance(value, kind):
        wanted = {dict: "a JSON object", list: "a JSON array"}[kind]
        raise UserError(f"The file '{path}' must hold {wanted}, but holds a {type(value).__name__}.")
    return value


def check_unicode(text: str, what: str) -> str:
    """The text itself.

    Args:
      text: from a command line or a JSON file, which can hold half of a surrogate pair: no text that can be written.
      what: it is, for the sentence.

    Raises:
      UserError: it is none.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not Unicode text: {text!a}.") from error
    return text
