import os
import sys

from lwd_jax.cli import main
from lwd_jax.cli.compiled import keep_compiled
from lwd_jax.cli.huge_pages import ask_for_huge_pages


def command() -> int:
    """The program `lwd`."""
    ask_for_huge_pages()
    keep_compiled("".join(sys.argv[1:2]), os.environ)
    return main()


if __name__ == "__main__":
    sys.exit(command())
