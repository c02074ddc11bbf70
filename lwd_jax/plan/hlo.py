"""The text of a compiled program, read: its computations, and how often each instruction runs.

`compiled.cost_analysis()` counts the body of a loop once; here trip counts are multiplied.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_PLACE = re.compile(r"S\((\d+)\)")  # memory space of a layout; none and 0 are the main memory
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPERATION = re.compile(r"\s*([\w\-]+)\(")
_NAMES = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"(\d+)"')


class Shape(NamedTuple):
    """One array of a type.

    Attributes:
      size: bytes, without the padding of tiles.
      main: it lies in the main memory (HBM).
    """

    size: float
    main: bool


def shapes(text: str) -> list[Shape]:
    """The arrays of a type, `f32[8,128]{1,0}` or a tuple of such."""
    found = []
    for kind, sides, layout in _SHAPE.findall(text):
        place = _PLACE.search(layout)
        count = math.prod(int(side) for side in sides.split(",") if side)
        # float8 kinds have long names; tokens and opaque types have no sides that count
        size = _BYTES.get(kind, 1 if kind.startswith("f8") else 0)
        found.append(Shape(count * size, not place or place[1] == "0"))
    return found


class Instruction(NamedTuple):
    """One line.

    Attributes:
      name, type, operation: `%name = type operation(..)`.
      operands: names.
      given: the text between the parentheses.
      attributes: the text after them.
      root: whether it is its computation's result.
    """

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    given: str
    attributes: str
    root: bool

    def called(self, word: str) -> list[str]:
        """Names of the computations of `word=..`."""
        match = re.search(rf"\b{word}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", match[1]) if match else []


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"An instruction has no end: {text[:200]}")


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    start = match.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    operation = _OPERATION.match(line, end)
    if not operation:
        return None
    last = _closing(line, operation.end() - 1)
    given = line[operation.end() : last - 1]
    names = tuple(_NAMES.findall(given))
    return Instruction(match[2], line[start:end], operation[1], names, given, line[last:], bool(match[1]))


class Run(NamedTuple):
    """An instruction and how often it runs.

    Attributes:
      instruction: the line.
      computation: the name of the one it stands in.
      times: runs of it in one run of the program; a branch of a conditional counts its share.
      fusion: the name of the fusion that it is part of, whose own line is another Run; "" = it stands by itself.
    """

    instruction: Instruction
    computation: str
    times: float
    fusion: str = ""


class Module:
    """A program. See the functions below for what it is asked."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction

    def trips(self, loop: Instruction) -> int:
        """How often the body of a while runs: what the compiler wrote down, or else the constant of its condition.

        Raises:
          ValueError: neither is there.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        found = []
        for name in self._reached(loop.called("condition")[0]):
            for instruction in self.computations[name].values():
                if instruction.operation == "constant" and re.match(r"[su](32|64)\[\]", instruction.type):
                    found.append(int(instruction.given))
        if not found:
            raise ValueError(f"The trip count of {loop.name} is not known.")
        return max(found)

    def _reached(self, name: str) -> list[str]:
        """A computation and those it calls."""
        names = [name]
        for instruction in self.computations[name].values():
            for word in ("calls", "to_apply"):
                for called in instruction.called(word):
                    names += self._reached(called)
        return names

    @cached_property
    def runs(self) -> list[Run]:
        """Every instruction that runs, in loops, branches, calls and fusions."""
        return list(self._walk(self.entry, 1.0, ""))

    def _walk(self, name: str, times: float, fusion: str) -> Iterator[Run]:
        for instruction in self.computations[name].values():
            yield Run(instruction, name, times, fusion)
            inside = fusion or (instruction.name if instruction.operation == "fusion" else "")
            for called, share in self._called(instruction):
                yield from self._walk(called, times * share, inside)

    def _called(self, instruction: Instruction) -> Iterator[tuple[str, float]]:
        """(computation, runs of it in one of the instruction)."""
        operation = instruction.operation
        if operation.endswith(("-done", "-update")):
            return  # what they wait for was counted where it started
        if operation == "while":
            yield instruction.called("body")[0], self.trips(instruction)
        elif operation == "conditional":
            names = instruction.called("branch_computations") or [
                *instruction.called("true_computation"),
                *instruction.called("false_computation"),
            ]
            yield from ((name, 1 / len(names)) for name in names)
        elif operation in ("fusion", "call", "async-start"):
            for name in instruction.called("calls") + instruction.called("to_apply"):
                yield name, 1.0

    def type_of(self, computation: str, name: str) -> str:
        """The type of a value of a computation."""
        return self.computations[computation][name].type


# ------------------------------------------------------------------------------------------- bytes of the main memory

_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "add-dependency", "domain", "opt-barrier", "async-start", "custom-call-start",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


def _main(type_: str) -> float:
    return sum(shape.size for shape in shapes(type_) if shape.main)


def _read(module: Module, run: Run, position: int, name: str) -> float:
    """Bytes that an instruction reads of one operand; of what it only slices, the slices."""
    own = _main(module.type_of(run.computation, name))
    if run.instruction.operation != "fusion" or not own:
        return own
    inside = module.computations[run.instruction.called("calls")[0]]
    parameter = next((i for i in inside.values() if i.operation == "parameter" and i.given == str(position)), None)
    if parameter is None:
        return own
    users = _users(inside, parameter.name)
    if users and all(user.operation in _SLICES and user.operands[0] == source for user, source in users):
        return min(own, sum(sum(s.size for s in shapes(user.type)) for user, _ in users))
    if users and all(_updates(user, source) for user, source in users):
        return 0.0  # updated where it lies
    return own


def _users(inside: dict[str, Instruction], name: str) -> list[tuple[Instruction, str]]:
    """(user, the name under which it reads) of a value, looked at through bitcasts."""
    found = []
    for user in inside.values():
        if name in user.operands:
            found += _users(inside, user.name) if user.operation == "bitcast" else [(user, name)]
    return found


def _updates(user: Instruction, source: str) -> bool:
    return user.operation == "dynamic-update-slice" and user.operands[0] == source


def _written(module: Module, run: Run) -> float:
    """Bytes that an instruction writes; of what it updates where it lies, the update."""
    own, instruction = _main(run.instruction.type), run.instruction
    inside, root = module.computations.get(run.computation, {}), instruction
    if instruction.operation == "fusion":
        inside = module.computations[instruction.called("calls")[0]]
        root = next(i for i in inside.values() if i.root)
        while root.operation == "bitcast":
            root = inside[root.operands[0]]
    roots = [inside[name] for name in root.operands] if root.operation == "tuple" else [root]
    for part in roots:
        if part.operation == "dynamic-update-slice":
            whole, update = _size(part.type), _size(inside[part.operands[1]].type)
            own -= min(own, whole) - update
    return max(own, 0.0)


def _size(type_: str) -> float:
    return sum(shape.size for shape in shapes(type_))


def memory_bytes(module: Module) -> float:
    """Bytes that one run moves to and from the main memory: operands and results of what is not fused, loops
    multiplied.

    What a kernel reads more than once (Pallas: keys and values, for every block of queries) is counted once.
    """
    total = 0.0
    for run in module.runs:
        operation = run.instruction.operation
        if run.fusion or operation in _FREE or operation.endswith(("-done", "-update")):
            continue
        if operation in _SLICES:
            moved = 2 * _main(run.instruction.type)
        elif operation == "dynamic-update-slice":
            moved = 2 * _size(module.type_of(run.computation, run.instruction.operands[1]))
        elif operation in ("send", "recv") or operation.endswith("-start"):  # the type repeats the operands
            moved = sum(_main(module.type_of(run.computation, name)) for name in run.instruction.operands)
        else:
            reads = enumerate(run.instruction.operands)
            moved = _written(module, run) + sum(_read(module, run, position, name) for position, name in reads)
        total += run.times * moved
    return total


_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


def estimated_cycles(module: Module) -> float:
    """The TPU compiler's own estimate of one run, loops multiplied; kernels are not in it. 0 = it wrote none."""
    return sum(
        run.times * int(found[1])
        for run in module.runs
        if not run.fusion and (found := _CYCLES.search(run.instruction.attributes))
    )
