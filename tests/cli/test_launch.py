"""The launchers, with stand-ins for Python and pip: whose paths are meant, and what is installed how often."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
[[ "$*" == *"pip install"* ]] && echo "$PWD: $*" >>"$LOG"
[[ "$*" == "--version" ]] && echo "Python 3.11.0"
[[ "$*" == *"-m pytest"* ]] && echo "tests: $*" >>"$LOG"
exit 0
"""
LWD = """#!/usr/bin/env bash
printf 'lwd in %s:' "$PWD" >>"$LOG"
printf ' <%s>' "$@" >>"$LOG"
echo >>"$LOG"
"""


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "check out"
    shutil.copytree(CHECKOUT / "launch", root / "launch")
    shutil.copy(CHECKOUT / "setup.py", root)
    for name, text in (("python", PYTHON), ("lwd", LWD)):
        file = root / ".venv" / "bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return root


def launch(root, script, *words, cwd):
    log = root / "log"
    log.unlink(missing_ok=True)
    log.touch()
    python = str(root / ".venv" / "bin" / "python")
    command = ["bash", str(root / "launch" / script), *words]
    ran = subprocess.run(
        command, cwd=cwd, env=os.environ | {"LOG": str(log), "PYTHON": python}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return log.read_text().splitlines(), ran.stdout


def test_relative_paths_are_those_of_the_caller(checkout, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    words = ("--images", "my photos", "--workdir", "runs/mine")
    lines, said = launch(checkout, "quickstart.sh", *words, cwd=tmp_path / "elsewhere")
    given = " <--images> <my photos> <--workdir> <runs/mine>"
    assert lines[-1] == f"lwd in {tmp_path}/elsewhere: <quickstart>{given}"
    assert lines[0].startswith(f"{checkout}: -m pip install") and lines[0].endswith("--editable .")
    assert f"source {str(checkout).replace(' ', chr(92) + ' ')}/.venv/bin/activate" in said


def test_launchers_that_take_turns_install_once_each(checkout):
    installed = []
    for script in ("quickstart.sh", "test.sh") * 2:
        lines, _ = launch(checkout, script, cwd=checkout)
        installed += [line.split()[-1] for line in lines if "pip install" in line]
    assert installed == [".", ".[test]"]
    (checkout / "setup.py").write_text("changed")
    lines, _ = launch(checkout, "test.sh", "-k", "saliency", cwd="/")
    assert lines[0].endswith(".[test]") and lines[-1].endswith("-k saliency")
