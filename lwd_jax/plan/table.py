"""A plan as a table to read and as JSON."""

import dataclasses
import math
from typing import Any

from lwd_jax.config import Config
from lwd_jax.plan.result import MARGIN, Result, limit
from lwd_jax.plan.roofline import Roofline, roofline
from lwd_jax.plan.search import Sweep, Try
from lwd_jax.plan.topology import GIB, Topology

UNKNOWN = "-"


def _gib(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / GIB:.2f} GiB"


def quantity(value: float | None, unit: str) -> str:
    """With three figures and a prefix: 1.25e12 FLOP -> "1.25 TFLOP"."""
    if value is None:
        return UNKNOWN
    if not value:
        return f"0 {unit}"
    power = min(max(math.floor(math.log10(abs(value)) / 3), -3), 6)
    prefix = ("n", "µ", "m", "", "k", "M", "G", "T", "P", "E")[power + 3]
    return f"{value / 1000**power:.3g} {prefix}{unit}"


def _verdict(result: Result, topology: Topology) -> str:
    fits = result.fits(topology)
    return UNKNOWN if fits is None else "fits" if fits else "DOES NOT FIT"


def memory_rows(result: Result, topology: Topology) -> dict[str, str]:
    """Memory per chip: label -> value."""
    memory = result.memory
    of = f" of {_gib(topology.chip.hbm / topology.chip.devices)}" if topology.chip.hbm else ""
    rows = {"state and batch, by shape": _gib(result.resident)}
    for field in ("arguments", "temporaries", "outputs", "code"):
        rows[field] = _gib(memory and getattr(memory, field))
    rows["peak"] = (_gib(result.peak) + of) if result.peak is not None else UNKNOWN
    rows[f"with {MARGIN:.0%} left"] = _verdict(result, topology)
    return rows


def work_rows(result: Result) -> dict[str, str]:
    """Work of one run: label -> value."""
    rows = {
        "FLOPs, by formula": quantity(result.model, "FLOP"),
        "FLOPs, counted": quantity(result.counted.total, "FLOP"),
        "of these in kernels": quantity(result.counted.kernels, "FLOP"),
        "memory moved, a chip": quantity(result.moved, "B"),
    }
    for row in result.traffic:
        rows[f"{row.kind} over {row.axes}"] = f"{quantity(row.sent, 'B')} in {row.count:.0f}"
    return rows


def time_rows(bounds: Roofline | None, runs: int) -> dict[str, str]:
    """Least times of one run: label -> value."""
    if bounds is None:
        return {}
    return {
        "least time: compute": quantity(bounds.compute, "s"),
        "least time: memory": quantity(bounds.memory, "s"),
        "least time: links": quantity(bounds.links, "s"),
        "least time: network": quantity(bounds.network, "s"),
        "binds": bounds.binds,
        "MFU, at most": f"{bounds.cap:.0%}",
        "pictures/s, at most": f"{bounds.pictures_per_second:.3g}",
        "by the compiler's cycles": quantity(bounds.estimated, "s"),
        "chip-hours, at least": f"{bounds.chip_hours(runs):,.0f}" if runs else UNKNOWN,
    }


def columns(config: Config, topology: Topology, results: list[Result]) -> list[dict[str, str]]:
    """One column a program: label -> value, in the order of the table."""
    found = []
    for result in results:
        runs = config.training.steps if result.program == "train" else 0
        head = {"pictures": str(result.pictures)}
        parts = (memory_rows(result, topology), work_rows(result), time_rows(roofline(result, topology), runs))
        found.append(head | parts[0] | parts[1] | parts[2] | {"compiled in": quantity(result.seconds or None, "s")})
    return found


def heading(config: Config, topology: Topology, mesh: dict[str, int]) -> str:
    """What is planned, in one line."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    return (
        f"{config.name or 'run'}: stage {config.stage}, {config.resolution} px, remat {config.remat}, {config.dtype}; "
        f"{machines(topology)}; mesh {axes}"
    )


def machines(topology: Topology) -> str:
    """How many there are of what, in words."""
    slices = f" x {topology.slices} slices" if topology.slices > 1 else ""
    hosts = f" on {_count(topology.hosts, 'host')}" if topology.chip.platform == "tpu" else ""
    return f"{topology.name}{slices}, {_count(topology.chips, 'chip')}{hosts}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def text(config: Config, topology: Topology, results: list[Result]) -> str:
    """The table of at least one program."""
    shown = columns(config, topology, results)
    labels = list(dict.fromkeys(label for column in shown for label in column))
    cells = [["per chip and run", *(result.program for result in results)]]
    cells += [[label, *(column.get(label, "") for column in shown)] for label in labels]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    lines.insert(1, "-" * len(lines[0]))
    missing = dict.fromkeys(result.missing for result in results if result.missing)
    return "\n".join([heading(config, topology, results[0].mesh), "", *lines, *(f"\nMissing: {m}" for m in missing)])


# ------------------------------------------------------------------------------------------------------------ a sweep

_SWEEP = {  # column -> width
    "mesh d f c t": 16, "remat": 9, "batch": 6, "state": 11, "peak": 11, "fits": 12, "least time": 10, "binds": 8,
    "pictures/s": 10, "compiled in": 11,
}  # fmt: skip


def sweep_head() -> str:
    """Above the rows of a sweep: its columns and a line."""
    head = "  ".join(name.ljust(width) for name, width in _SWEEP.items()).rstrip()
    return f"{head}\n{'-' * len(head)}"


def sweep_row(tried: Try, topology: Topology) -> str:
    """One row: the mesh is data x fsdp x context x tensor, the state with the batch and by shape."""
    result = tried.result
    known = topology.devices is None or result.peak is not None  # else it did not compile
    bounds = roofline(result, topology) if known else None
    cells = [
        "x".join(map(str, result.mesh.values())),
        tried.config.remat,
        str(tried.config.data.batch_size),
        _gib(result.resident),
        _gib(result.peak),
        _verdict(result, topology),
        quantity(bounds and bounds.least, "s"),
        bounds.binds if bounds else UNKNOWN,
        f"{bounds.pictures_per_second:.3g}" if bounds else UNKNOWN,
        quantity(result.seconds or None, "s"),
    ]
    row = "  ".join(cell.ljust(width) for cell, width in zip(cells, _SWEEP.values())).rstrip()
    return row if known else f"{row}\n  {result.missing}"


def _hours(config: Config, best: Try, topology: Topology) -> tuple[float, float] | None:
    """Chip-hours of the run's steps, and of as many pictures as the config has without the settings."""
    bounds = roofline(best.result, topology)
    if bounds is None:
        return None
    same = config.training.steps * config.data.batch_size / best.config.data.batch_size
    return bounds.chip_hours(config.training.steps), bounds.chip_hours(1) * same


def sweep_text(config: Config, topology: Topology, found: Sweep) -> str:
    """What a sweep comes to: below its rows."""
    lines = [f"{len(found.tried)} of {found.candidates} possible settings were tried."]
    lines += [f"Not possible: {reason} ({count})" for reason, count in found.pruned.items()]
    lines += [f"Missing: {found.missing}"] if found.missing else []
    if found.best is None:
        return "\n".join([*lines, "Nothing that was tried fits: try more (--sweep N), or take a larger slice."])
    lines.append(f"Best, add: {found.best.words}" if found.best.settings else "Best: the config as it is.")
    if (hours := _hours(config, found.best, topology)) is not None:
        lines.append(f"Chip-hours, at least: {hours[0]:,.3g} for {config.training.steps:,} steps.")
        if found.best.config.data.batch_size != config.data.batch_size:
            lines.append(
                f"The batch changes from {config.data.batch_size} to {found.best.config.data.batch_size}: the learning "
                f"rate is yours to settle; as many pictures as now take {hours[1]:,.3g} chip-hours."
            )
    return "\n".join(lines)


def _result_json(result: Result, topology: Topology) -> dict[str, Any]:
    bounds = roofline(result, topology)
    row = dataclasses.asdict(result) | {"traffic": [part._asdict() for part in result.traffic]}
    row["counted"] = result.counted._asdict()
    row["fits"] = result.fits(topology)
    if bounds is not None:
        row["roofline"] = dataclasses.asdict(bounds) | {
            "least": bounds.least,
            "binds": bounds.binds,
            "mfu_cap": bounds.cap,
            "pictures_per_second": bounds.pictures_per_second,
        }
    return row


def sweep_json(config: Config, topology: Topology, found: Sweep) -> dict[str, Any]:
    """The same as numbers; `best` is a row of `tried`, by its number."""
    rows = [
        {"settings": each.settings, "words": each.words, "batch": each.config.data.batch_size}
        | {"remat": each.config.remat, "result": _result_json(each.result, topology)}
        for each in found.tried
    ]
    best = None
    if found.best is not None:
        hours = _hours(config, found.best, topology)
        best = {"row": found.tried.index(found.best), "words": found.best.words}
        best |= {"chip_hours": hours and hours[0], "chip_hours_same_pictures": hours and hours[1]}
    return {
        "tried": rows,
        "candidates": found.candidates,
        "pruned": found.pruned,
        "best": best,
        "missing": found.missing,
    }


def as_json(config: Config, topology: Topology, results: list[Result]) -> dict[str, Any]:
    """The same as numbers: bytes, FLOPs, seconds."""
    return {
        "name": config.name,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "limit": limit(topology),
        "config": dataclasses.asdict(config),
        "programs": [_result_json(result, topology) for result in results],
    }
