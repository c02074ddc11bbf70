"""Laws: what one command compiled the next reads, out of the user's cache or the folder that the user named."""

import os
import subprocess
import sys

import numpy as np
import pytest
from etils.epath import Path
from PIL import Image

from lwd_jax.cli.compiled import ENABLED, FOLDER, LIMIT, keep_compiled


@pytest.mark.parametrize("given", ["/somewhere", ""])
def test_the_folder_of_the_user_stays(given):
    environment = {FOLDER: given}
    keep_compiled("train", environment)
    assert environment == {FOLDER: given}  # "" keeps nothing


def test_the_limit_of_the_user_stays():
    environment = {LIMIT: "-1"}
    keep_compiled("train", environment)
    assert environment.pop(FOLDER).endswith("/lwd_jax/compiled") and environment == {LIMIT: "-1"}


def test_a_plan_is_of_machines_that_are_not_here():
    environment = {FOLDER: "/somewhere"}
    keep_compiled("plan", environment)
    assert environment == {FOLDER: "/somewhere", ENABLED: "false"}


def test_the_next_command_reads_it(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / "picture.png")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for name in (FOLDER, LIMIT):
        environment.pop(name, None)

    def inspect(out):
        words = [sys.executable, "-m", "lwd_jax.cli", "inspect", str(tmp_path / "picture.png"), "--out", str(out)]
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0 and "cache" not in ran.stderr, ran.stderr
        kept = list((Path(tmp_path) / "lwd_jax" / "compiled").iterdir())
        read = {file.name: file.read_bytes() for file in kept if file.name.endswith("-atime")}
        return {file.name for file in kept}, read, (out / "inspect.json").read_text()

    first, second = inspect(tmp_path / "first"), inspect(tmp_path / "second")
    assert first[0] == second[0] and len(first[1]) > 1
    assert all(second[1][name] != when for name, when in first[1].items())  # when each was used last
    assert first[2].replace("first", "second") == second[2]
