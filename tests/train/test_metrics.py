"""metrics.jsonl: a line that a kill cut short is no line; damage within the file is named. TensorBoard has every step
once. Windows: what is a mean, what is the last of them, and of which seconds.
"""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lwd_jax.errors import UserError
from lwd_jax.train import metrics
from lwd_jax.train.metrics import FILE, Window, Writer, read

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


# ----------------------------------------------------------------------------------------------------- TensorBoard


def events(path):
    """Of a file of records: length, its checksum, the record, its checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def shown(workdir):
    """(step, value) as TensorBoard shows them: a session that starts at a step hides what came before from there on."""
    points = []
    for path in sorted((workdir / "tb").iterdir()):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value]
    return points


def test_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = Writer(tmp_path, start)
        for step in steps:
            writer.write(step, {"loss": 10.0 * start + step})
        writer.close()
        for path in (tmp_path / "tb").glob("events*"):  # two of one second would have one name
            path.rename(path.with_name(f"{start} {path.name}"))
    assert shown(tmp_path) == [(1, 1), (2, 2), (3, 23), (4, 24)]


# --------------------------------------------------------------------------------------------------------- windows


def step_of(rate=0.1, streak=0, **values):
    return {"learning_rate": rate, "skipped": streak, "streak": streak} | values


def test_a_window_reports_its_last_rate_and_the_means_of_what_was_taken():
    window = Window()
    losses, rates = np.random.default_rng(0).uniform(1, 2, (2, 5))
    for number, (loss, rate) in enumerate(zip(losses, rates)):
        window.add(step_of(rate, loss=np.nan if number == 1 else loss, streak=int(number == 1)), 8)
    line = window.line(0.0)
    assert line["learning_rate"] == rates[-1]
    assert line["loss"] == pytest.approx(np.mean(np.delete(losses, 1)))


def test_its_speed_leaves_out_the_seconds_away(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    window = Window()
    for away in (4.0, 0.0, 1.0):
        clock.now += 6 + away
        window.restart_clock(away)
        for _ in range(3):
            window.add(step_of(), 8)
        line = window.line(1.5)
        assert (line["pictures_per_second"], line["data_wait_share"]) == (3 * 8 / 6, 1.5 / 6)
