"""metrics.jsonl: a line that a kill cut short is no line; damage within the file is named."""

import json

import pytest

from lwd_jax.errors import UserError
from lwd_jax.train.metrics import FILE, Writer, read

ROWS = [{"step": step, "loss": 1 / step, "preview/psnr": None} for step in (1, 2, 3)]
LINES = [json.dumps(row) for row in ROWS]


def write(workdir, *lines):
    (workdir / FILE).write_text("\n".join(lines))


def rewritten(workdir, step):
    """The rows after a run resumed at a step, read as plain JSON lines."""
    Writer(workdir, step).close()
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def test_there_is_nothing_to_read_before_the_first_line(tmp_path):
    assert read(tmp_path) == []
    write(tmp_path)
    assert read(tmp_path) == rewritten(tmp_path, 2) == []


@pytest.mark.parametrize("length", [1, 9, len(LINES[2]) - 1])
def test_a_last_line_that_was_cut_is_left_out(tmp_path, length):
    write(tmp_path, *LINES[:2], LINES[2][:length])
    assert read(tmp_path) == ROWS[:2]
    assert rewritten(tmp_path, 1) == ROWS[:1]


def test_a_whole_last_line_is_kept_without_its_end(tmp_path):
    write(tmp_path, *LINES)
    assert read(tmp_path) == rewritten(tmp_path, 3) == ROWS


@pytest.mark.parametrize("broken", ["{", "", '{"step": 2', "[2", '{"loss": 0.5}', "2"])
def test_a_broken_line_before_the_last_is_named(tmp_path, broken):
    write(tmp_path, LINES[0], broken, LINES[2])
    for use in (read, lambda workdir: Writer(workdir, 3)):
        with pytest.raises(UserError, match=f"Line 2 of .*{FILE} is not"):
            use(tmp_path)
    assert (tmp_path / FILE).read_text().splitlines()[1] == broken
