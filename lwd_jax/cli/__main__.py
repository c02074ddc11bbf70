import sys

from lwd_jax.cli import main
from lwd_jax.cli.huge_pages import ask_for_huge_pages


def command() -> int:
    """The program `lwd`."""
    ask_for_huge_pages()
    return main()


if __name__ == "__main__":
    sys.exit(command())
