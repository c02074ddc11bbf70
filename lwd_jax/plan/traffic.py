"""What a compiled program sends between chips: bytes per collective and mesh axis."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lwd_jax.plan.hlo import Module, Run, shapes

# Collective -> bytes that each of n chips sends, over the bytes of its operands, in rings (or, of the last, to all).
SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
    "send": lambda n: 1,  # between slices
}
BETWEEN_SLICES = "slices"
# The TPU compiler spreads a gather over several fusions, so that it goes on while they compute: every one of them holds
# it, under one chain_id, and it begins in the one of this name.
_CHAIN = re.compile(r'chain_id="\d+"')
_BEGINS = "async-collective-start"
# It also fuses an all-reduce with the slice that is kept of it; such a fusion is a reduce-scatter.
_SCATTERED = re.compile(r"all-reduce-scatter|reduce-scatter")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_ORDER = r"\[[\d,]+\](?:T\([\d,]+\))?"  # of an iota: its sides and how they are transposed
_IOTA = re.compile(rf"replica_groups=\[([\d,]+)\]<=({_ORDER})")
_OF_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(({_ORDER}|[\d,]+)\))? \{{([^}}]*)\}}")
_SOME = re.compile(r"replica_groups=(?!\{\})")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


class Traffic(NamedTuple):
    """One kind of collective over the same mesh axes, summed over a run of the program, per chip.

    Attributes:
      kind: a key of SENT.
      axes: of the mesh, joined by "+"; "slices" between slices.
      count: how often it runs.
      sent: bytes that a chip sends, and receives.
    """

    kind: str
    axes: str
    count: float
    sent: float


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _ordered(text: str) -> np.ndarray:
    """The numbers of `[4,16]T(1,0)`, those below 64 as 4 rows, transposed; or those of a list `0,2,1,3`."""
    if not text.startswith("["):
        return np.array(_numbers(text))
    sides, _, axes = text.strip("[)").partition("]")
    ids = np.arange(math.prod(_numbers(sides))).reshape(_numbers(sides))
    return (ids.transpose(_numbers(axes.removeprefix("T("))) if axes else ids).ravel()


def groups_of(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices (numbers in the order of the mesh) that a collective runs in, or its (source, target)
    pairs.

    Raises:
      ValueError: they are written in a form that is not known here.
    """
    if match := _PAIRS.search(attributes):
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := _LISTED.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := _IOTA.search(attributes):
        return _ordered(match[2]).reshape(_numbers(match[1])).tolist()
    if match := _OF_MESH.search(attributes):
        return _of_mesh(*match.groups())
    if _SOME.search(attributes):
        raise ValueError(f"These groups of devices cannot be read: {attributes[:200]}")
    return [list(range(devices))]


def _of_mesh(axes: str, order: str | None, chosen: str) -> list[list[int]]:
    """Groups of `mesh['a'=4,'b'=2] {'a'}`, or of a part of an axis, `{'a':(1)2}`: after a factor of 1, 2 of its 4. The
    mesh is made of the devices in order, or of `device_ids=([2,4]T(1,0))`.
    """
    sides, parts = [], []
    picked = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}
    for name, side in re.findall(r"'([^']+)'=(\d+)", axes):
        before, size = (int(n or 0) for n in picked.get(name, ("1", "1")))
        before, size = (before, size) if size else (1, int(side))
        parts.append(len(sides) + 1)
        sides += [before, size, int(side) // (before * size)]
    ids = np.arange(math.prod(sides)) if order is None else _ordered(order)
    ids = ids.reshape(sides)
    return np.moveaxis(ids, parts, range(-len(parts), 0)).reshape(-1, math.prod(sides[p] for p in parts)).tolist()


def axes_of(groups: Iterable[list[int]], mesh: dict[str, int]) -> str:
    """The mesh axes along which the members of the groups differ, joined by "+"."""
    sizes = tuple(mesh.values())
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        for a, b in itertools.pairwise(group):
            differ |= np.array(np.unravel_index(a, sizes)) != np.array(np.unravel_index(b, sizes))
    return "+".join(axis for axis, differs in zip(mesh, differ) if differs)


def _kind(run: Run) -> str | None:
    operation = run.instruction.operation.removesuffix("-start")
    if operation not in SENT:
        return None
    if run.fusion and _CHAIN.search(run.instruction.attributes) and not run.fusion.startswith(_BEGINS):
        return None
    if operation == "all-reduce" and run.fusion and _SCATTERED.search(run.computation):
        return "reduce-scatter"
    return operation


def traffic_of(module: Module, mesh: dict[str, int]) -> list[Traffic]:
    """Everything that one run of a program sends, largest first.

    Args:
      module: the program, of every chip.
      mesh: its axes and their sizes, in order; the devices are numbered in row-major order.
    """
    devices = math.prod(mesh.values())
    total = defaultdict(lambda: [0.0, 0.0])
    for run in module.runs:
        kind = _kind(run)
        if kind is None:
            continue
        axes, factor = BETWEEN_SLICES, 1.0
        if kind != "send":
            groups = groups_of(run.instruction.attributes, devices)
            axes, factor = axes_of(groups, mesh), SENT[kind](max(map(len, groups)))
        if not axes:
            continue  # groups of one
        operands = (module.type_of(run.computation, name) for name in run.instruction.operands)
        size = sum(shape.size for type_ in operands for shape in shapes(type_))
        total[kind, axes][0] += run.times
        total[kind, axes][1] += run.times * factor * size
    rows = [Traffic(kind, axes, count, sent) for (kind, axes), (count, sent) in total.items()]
    return sorted(rows, key=lambda row: -row.sent)
