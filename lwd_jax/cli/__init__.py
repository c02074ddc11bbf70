"""The `lwd` command. Each file of this folder is one thin command of `EXAMPLE`,
`arguments(parser)` and `run(args)`; its docstring is the description that `--help` prints.
"""

import argparse
import importlib
import importlib.metadata
import logging
import sys

from lwd_jax.errors import MISTAKE, TOLD, UserError, did_you_mean, exit_code, sentence

COMMANDS = {
    "quickstart": "both stages, sampling, export and a report, on real photographs that ship with the dependencies",
    "prepare": "a folder of pictures and captions -> a dataset",
    "encode": "a dataset -> latents and text states",
    "train": "train either stage; the same command resumes",
    "sample": "pictures from a diffusers folder or a workdir",
    "export": "a workdir -> a diffusers folder",
    "import": "a diffusers folder -> a workdir to start from",
    "plan": "compile a run for a TPU slice on any machine: does it fit, how fast can it be",
    "inspect": "saliency, masks over time and spectra of pictures, as pictures",
    "doctor": "versions, devices, disk, dataset and config sanity",
}


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command; importing this package alone imports no model code."""
    module = importlib.import_module(f"lwd_jax.cli.{name}_" if name == "import" else f"lwd_jax.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"lwd {name}",
        description=module.__doc__,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    about = "`lwd COMMAND --help` shows a command's arguments and an example; `lwd --version` the version."
    return f"usage: lwd COMMAND ...\n\n{rows}\n\n{about}"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit status: 0 done, 2 the user's mistake, 75 a failure that may pass (a full disk, say).

    Raises:
      KeyboardInterrupt: it was interrupted, and has said so.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every workdir that is only read
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else MISTAKE
    if argv[0] == "--version":
        print(f"lwd_jax {importlib.metadata.version('lwd_jax')}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"There is no command '{argv[0]}'.{did_you_mean(argv[0], COMMANDS)}")
        args, rest = parser_of(argv[0]).parse_known_args(argv[1:])
        overrides = [a for a in rest if a.startswith("--config.")]
        unknown = [a for a in rest if a not in overrides]
        if unknown or (overrides and not hasattr(args, "config")):
            raise UserError(f"lwd {argv[0]} does not know {' '.join(unknown or overrides)}; see lwd {argv[0]} --help.")
        args.overrides = overrides
        return args.run(args) or 0
    except TOLD as error:
        print(f"lwd: {sentence(error)}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("lwd: interrupted.", file=sys.stderr)
        raise
