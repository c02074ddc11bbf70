"""What a run reports: windows of steps, one line of metrics.jsonl and one TensorBoard point per window."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from lwd_jax.train.step import SUMMED

FILE = "metrics.jsonl"
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


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except ValueError:
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{text}\n" for text in kept))
    partial.replace(path)


class Writer:
    """metrics.jsonl and tb/ of a workdir, from the restored step on: no line is there twice. Only process 0 writes."""

    def __init__(self, workdir: Path, step: int):
        self._file = self._board = None
        if jax.process_index() == 0:
            _drop_after(workdir / FILE, step)
            self._file = open(workdir / FILE, "a", encoding="utf-8")
            self._board = SummaryWriter(str(workdir / "tb"), purge_step=step + 1)

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

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; [] before the first."""
    path = Path(workdir) / FILE
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
