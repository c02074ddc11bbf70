"""What a run reports: windows of steps, one line of metrics.jsonl and one TensorBoard point per window."""

import json
import math
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from lwd_jax.errors import UserError
from lwd_jax.files import Spool, locate, write_whole
from lwd_jax.train.step import SUMMED

FILE = "metrics.jsonl"
PUSH_SECONDS = 30.0  # of watching a run in a bucket; every push writes the whole object again
_LAST = ("learning_rate", "skipped")  # not averaged: the value after the window's last step


class Window:
    """Sums and means over the steps since the last line. Skipped steps do not enter the means."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._means: dict[str, list[float]] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._last: dict[str, float] = {}
        self._pictures = 0
        self._start = time.perf_counter()

    def restart_clock(self, away: float = 0.0) -> None:
        """Leaves `away` seconds (of previews, of saving) out of the speed."""
        self._start += away

    def add(self, metrics: dict[str, Any], pictures: int) -> None:
        """One step's metrics, as numpy scalars and vectors."""
        self._pictures += pictures
        for name in _LAST:
            self._last[name] = float(metrics[name])
        if metrics["streak"]:
            return
        for name, value in metrics.items():
            if name.endswith(SUMMED):
                self._sums[name] = self._sums.get(name, 0) + np.asarray(value, np.float64)
            elif name not in (*_LAST, "streak"):
                self._means.setdefault(name, []).append(float(value))

    def line(self, waited: float) -> dict[str, Any]:
        """The window as one JSON object, and begins the next one.

        Args:
          waited: seconds of the window spent waiting for data.

        Means of scalars; `loss_by_time` the mean over the window's pictures per time bin (null: none fell there), with
        `count_by_time`; `pictures_per_second`; `data_wait_share` in [0, 1].
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        line: dict[str, Any] = {name: float(np.mean(values)) for name, values in self._means.items()}
        counts = self._sums.get("count" + SUMMED)
        for name, total in self._sums.items():
            if name == "count" + SUMMED:
                line[name] = total.tolist()
            else:
                line[name] = [float(s / c) if c > 0 else None for s, c in zip(total, counts)]
        line |= self._last | {"skipped": int(self._last.get("skipped", 0))}
        line["pictures_per_second"] = self._pictures / seconds
        line["data_wait_share"] = min(waited / seconds, 1.0)
        self._clear()
        return line


def _row(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl, as they stand and as JSON objects, without a last one that a kill cut short; [] of a
    file that is not there.

    Raises:
      UserError: a line before the last one is broken; with the file's name and the line's number.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [(text, _row(text)) for text in lines]
    if rows and rows[-1][1] is None:
        rows.pop()
    for number, (_, row) in enumerate(rows, start=1):
        if row is None:
            raise UserError(f"Line {number} of {path} is not the JSON object of a step; remove that line.")
    return rows


def _summary_writer() -> type:
    """tensorboardX's, whose import takes a second without PyTorch, which it would import too for one annotation."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # which importing finds as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter


def _drop_after(path: Path, step: int, target: Path) -> None:
    """Writes the lines to `target`, which may be `path` itself, without those of steps after `step` and a last one that
    a kill cut short.
    """
    if not path.exists():
        return
    write_whole(target, b"".join(text + b"\n" for text, row in _rows(path) if row["step"] <= step))


class Writer:
    """metrics.jsonl and tb/ of a workdir, from the restored step on: no line is there twice. Only process 0 writes.

    Into a bucket they are copied every PUSH_SECONDS, and by `push`.
    """

    def __init__(self, workdir: str | os.PathLike, step: int):
        self._file = self._board = None
        if jax.process_index() == 0:
            workdir = locate(workdir)
            self._spool = Spool(workdir)
            here = self._spool.here
            _drop_after(workdir / FILE, step, here / FILE)
            self._file = (here / FILE).open("a", encoding="utf-8")
            self._board = _summary_writer()(str(here / "tb"), purge_step=step + 1)
            self._pushed = time.monotonic()

    def write(self, step: int, line: dict[str, Any]) -> None:
        """One line; numbers that are not finite become null."""
        if self._file is None:
            return
        clean = {name: _json(value) for name, value in line.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)
            else:
                for number, part in enumerate(value):
                    if part is not None:
                        self._board.add_scalar(f"{name}/{number}", part, step)
        if time.monotonic() - self._pushed >= PUSH_SECONDS:
            self.push()

    def push(self) -> None:
        """What has been written is in the workdir on return: of a mounted bucket too, which gets a file when it is
        synchronised."""
        if self._file is not None:
            self._board.flush()
            os.fsync(self._file.fileno())
            self._spool.push()
            self._pushed = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._spool.close()


def _json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a last one that a kill cut short; [] before the first.

    Raises:
      UserError: a line before the last one is broken.
    """
    return [row for _, row in _rows(locate(workdir) / FILE)]
