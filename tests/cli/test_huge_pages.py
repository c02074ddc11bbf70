"""Huge pages are asked for where asking helps, by a process that stays the same one."""

import json
import os
import subprocess
import sys

import pytest

from lwd_jax.cli import huge_pages
from lwd_jax.cli.huge_pages import TUNABLE, VARIABLE, to_be_asked_for

PROGRAM = """
import json, os, sys
from pathlib import Path
from lwd_jax.cli import huge_pages

huge_pages.MODE = Path(sys.argv[1])
huge_pages.ask_for_huge_pages()
print(json.dumps([os.getpid(), os.environ.get(huge_pages.VARIABLE), sys.argv[1:], sys.flags.dev_mode]))
"""


@pytest.mark.parametrize(
    ("environment", "mode", "libc", "expected"),
    [
        ({}, "madvise", "glibc 2.36", True),
        ({"HOME": "/root"}, "madvise", "glibc 3.0", True),
        ({}, "madvise", "glibc 2.34", False),  # does not know the tunable
        ({}, "madvise", "", False),  # musl, macOS
        ({}, "always", "glibc 2.36", False),
        ({}, "never", "glibc 2.36", False),
        ({}, "", "glibc 2.36", False),
        ({VARIABLE: ""}, "madvise", "glibc 2.36", False),  # the user's word
        ({VARIABLE: TUNABLE}, "madvise", "glibc 2.36", False),  # or it would start again for ever
    ],
)
def test_asked_for_where_it_helps(environment, mode, libc, expected):
    assert to_be_asked_for(environment, mode, libc) == expected


@pytest.mark.parametrize(
    ("text", "mode"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), ("?", ""), (None, "")],
)
def test_the_mode_is_the_kernels(text, mode, tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(huge_pages, "MODE", file)
    assert huge_pages.kernel_mode() == mode


@pytest.mark.parametrize("mode", ["always [madvise] never", "[always] madvise never"])
def test_the_program_starts_again_as_it_was(mode, tmp_path):
    program, file = tmp_path / "a program.py", tmp_path / "the mode"
    program.write_text(PROGRAM)
    file.write_text(mode)
    given = [str(file), "--two words", "", "$HOME"]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-X", "dev", program, *given]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        pid, tunable, arguments, dev_mode = json.loads(process.communicate()[0])
    asked = "[madvise]" in mode and to_be_asked_for({}, "madvise", huge_pages._libc())
    assert tunable == (TUNABLE if asked else None)
    assert (pid, arguments, dev_mode) == (process.pid, given, True)
