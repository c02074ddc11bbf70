"""Progress with the time that is left, for commands that take longer than two seconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lwd_jax.files import cleared_up


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function of (what, done, total) that draws one bar for each `what`, on the terminal only.

    A signal leaves the terminal as it was.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with cleared_up(), Progress(*columns, transient=True) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
