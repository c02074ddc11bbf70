"""The one exception that is the user's to mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was given: one clear sentence. Commands print it and exit with 2, without a traceback."""


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
