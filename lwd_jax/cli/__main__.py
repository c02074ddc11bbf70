import gc
import os
import sys

from lwd_jax.cli import main
from lwd_jax.cli.compiled import keep_compiled
from lwd_jax.cli.huge_pages import ask_for_huge_pages


def command() -> int:
    """The program `lwd`."""
    # What is imported and what is traced are hundreds of thousands of objects that live on. Looking for garbage among
    # them takes a quarter of a command's start and an eighth of tracing a step, and once more when it ends.
    gc.set_threshold(100_000, 10, 10)
    ask_for_huge_pages()
    keep_compiled("".join(sys.argv[1:2]), os.environ)
    try:
        return main()
    except (KeyboardInterrupt, SystemExit) as stopped:
        # Where a step is still computed, in another thread, taking the interpreter down would crash. What was to be
        # cleared up has been.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(stopped, KeyboardInterrupt) else stopped.code or 0)
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(command())
