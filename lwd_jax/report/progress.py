"""What functions that take long tell of their progress; `cli.progress` draws it."""

import contextlib
from collections.abc import Callable, Iterator

Show = Callable[[str, int, int], None]  # (what is being done, done, total)


def ignore(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@contextlib.contextmanager
def shown(show: Show, what: str) -> Iterator[None]:
    """A part of the work that says nothing while it runs: of a large model each takes a minute."""
    show(what, 0, 1)
    yield
    show(what, 1, 1)
