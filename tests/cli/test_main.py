"""The `lwd` command itself: its version and its start; files that cannot be read or written are one sentence."""

import contextlib
import errno
import importlib.metadata
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils.epath.gpath import PosixGPath as Path
from PIL import Image
from tiny_models import write_workdir

from lwd_jax.cli import inspect, main
from lwd_jax.errors import Transient, UserError
from lwd_jax.train.checkpoint import MANIFEST


def sentence(capsys):
    said = capsys.readouterr().err
    assert said.startswith("lwd: ") and said.count("\n") == 1, said
    return said


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.full((96, 96, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lwd_jax {importlib.metadata.version('lwd_jax')}\n"


SELDOM = {"matplotlib", "scipy", "tensorboardX", "torch", "diffusers", "transformers"}


INTERRUPTED = """
import sys, time
import jax, jax.numpy as jnp
from lwd_jax.cli import __main__ as program

def main():
    x = jnp.ones((1500, 1500))
    for _ in range(40):  # is computed in another thread
        x = x @ x / 1500
    raise {error}

program.main = main
sys.exit(program.command())
"""


@pytest.mark.parametrize("error, code", [("KeyboardInterrupt", 130), ("SystemExit(143)", 143)])
def test_an_interrupted_command_ends_at_once_while_something_is_computed(error, code):
    assert subprocess.run([sys.executable, "-c", INTERRUPTED.format(error=error)]).returncode == code


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_leaves_the_terminal_as_it_was(number, code):
    """Its cursor, which a bar hides."""
    program = (
        "import os, time; from lwd_jax.cli.progress import progress\n"
        f"with progress() as show: show('x', 0, 1); time.sleep(0.3); os.kill(os.getpid(), {int(number)}); time.sleep(9)"
    )
    terminal, other = os.openpty()
    environ = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=other, stderr=subprocess.DEVNULL, env=environ)
    os.close(other)
    said = b""
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as file:  # EIO: the other end is closed
        while part := file.read(4096):
            said += part
    assert process.wait(60) in (code, -number)
    assert said.count(b"\x1b[?25l") == said.count(b"\x1b[?25h") == 1


def test_commands_start_without_what_few_of_them_use(tmp_path):
    """Each takes a second to import. The metrics of a run do not need PyTorch; it can be imported after them."""
    script = f"""
import sys
from lwd_jax import cli
for name in cli.COMMANDS:
    cli.parser_of(name)
print({SELDOM} & set(sys.modules))
from lwd_jax.train.metrics import Writer
Writer({str(tmp_path)!r}, 0).close()
print("torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout == "set()\nFalse\n", ran.stdout + ran.stderr
    assert [path.name.split(".")[0] for path in (tmp_path / "tb").iterdir()] == ["events"]


def test_a_file_in_place_of_a_workdir_is_named(picture, capsys):
    assert main(["quickstart", "--workdir", str(picture)]) == 2
    assert f"{picture} is a file" in sentence(capsys)
    assert main(["inspect", str(picture), "--out", str(picture / "out")]) == 2
    assert str(picture) in sentence(capsys)


def test_an_output_that_cannot_be_written_is_named(picture, tmp_path, capsys, monkeypatch):
    def refuse(path, *_, **__):  # chmod would not keep root from writing
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for words in (
        ["inspect", str(picture), "--out", str(tmp_path / "out")],
        ["prepare", "--images", str(tmp_path), "--no-captions", "--out", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        assert sentence(capsys) == f"lwd: {tmp_path}: Permission denied.\n"


def raised_from(cause):
    try:
        raise UserError("It could not be written.") from cause
    except UserError as error:
        return error


@pytest.mark.parametrize(
    "error, code",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 75),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/mnt/bucket"), 75),
        (TimeoutError("timed out"), 75),
        (raised_from(OSError(errno.EIO, "Input/output error", "x")), 75),
        (Transient("Not all came."), 75),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2),
        (OSError("image file is truncated"), 2),
        (raised_from(BlockingIOError(errno.EAGAIN, "taken", "x")), 2),
        (UserError("It is not there."), 2),
    ],
    ids=str,
)
def test_what_may_pass_has_another_exit_code_than_a_mistake(picture, error, code, capsys, monkeypatch):
    """Launchers run a command again that ended with 75, and end with one that ended with 2."""

    def refuse(*_):
        raise error

    monkeypatch.setattr(inspect, "run", refuse)
    assert main(["inspect", str(picture), "--out", "out"]) == code
    sentence(capsys)


def test_a_picture_that_cannot_be_read_is_named(picture, tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert main(["inspect", str(picture), "--out", str(tmp_path / "out")]) == 2
    assert f"'{picture}' cannot be read: Permission denied." in sentence(capsys)


def test_a_description_that_is_cut_off_is_named(tmp_path, capsys):
    run = write_workdir(tmp_path / "run", 1)
    for name in ("model.json", "config.json"):
        (run / name).write_text((run / name).read_text()[:-20])
        assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "out")]) == 2
        assert "JSON" in sentence(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_cut_file_that_a_library_reads_is_one_sentence(tmp_path, capsys):
    """Orbax reads it: the run was killed before it wrote the checksums that would have named it."""
    run = write_workdir(tmp_path / "run", 1)
    step = run / "checkpoints" / "7"
    (step / MANIFEST).unlink()
    (step / "params" / "_METADATA").write_bytes((step / "params" / "_METADATA").read_bytes()[:-20])
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "step 7: params/_METADATA is not sound JSON" in sentence(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
