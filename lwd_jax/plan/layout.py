"""A program's layout on a TPU chip: its text and where its memory lies, as the compiler writes them to a folder.

They are there long before it is done: most of its time goes into machine code, on one core. No flag makes it stop
before that, so `lay_out` has it work in a process of its own, which it ends then.
"""

import dataclasses
import multiprocessing
import re
import tempfile
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
from etils.epath import Path

from lwd_jax.config import Config
from lwd_jax.errors import UserError
from lwd_jax.plan import gpus
from lwd_jax.plan.flags import flags_of
from lwd_jax.plan.programs import Makers, Planned, mesh_of, planned
from lwd_jax.plan.result import Memory
from lwd_jax.plan.topology import Topology, open_topology

_PLACED = re.compile(r"^Memory Space: default \(color=0\)\nTotal bytes: (\d+)", re.MULTILINE)
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.MULTILINE)  # of other memories: "color N, .."
_LAID = "after_optimizations"  # the stage of the compiler after which a module's files are named
_POLL = 0.2  # s


class Layout(NamedTuple):
    """What is known of a compiled program.

    Attributes:
      memory: of a chip; no code where that was not made.
      text: of the program; "" where it cannot be told. The TPU compiler's cycles stand in it once there is code.
    """

    memory: Memory
    text: str


def _dump_flags(folder: str) -> dict[str, Any]:
    """What makes the compiler write to a folder."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def module_name(lowered: jax.stages.Lowered) -> str:
    """As the compiler's files have it: jit_step."""
    return lowered.compiler_ir().operation.attributes["sym_name"].value


def _file(folder: Path, module: str, ending: str) -> Path | None:
    return next(iter(folder.glob(f"module_*.{module}.*{ending}")), None)


def _is_laid_out(folder: Path, module: str) -> bool:
    """Whether all that `read_layout` reads is whole: this file is written after it."""
    return _file(folder, module, f".{_LAID}_after_buffer_assignment.txt") is not None


def read_layout(folder: Path, module: str) -> Layout | None:
    """The layout of a module of which the compiler wrote its files; None where it wrote none.

    memory_analysis does not tell the memory of TPUs: it gave SD3-medium's step 2.58 GiB of temporaries (jaxlib 0.10.2,
    libtpu 0.0.42) of which the compiler's own report knows 1.79, and its peak counts the fast memory on the chip too.
    """
    endings = ("-memory-usage-report.txt", "-buffer-assignment.txt", ".txt")
    files = [_file(folder, module, f".{_LAID}{ending}") for ending in endings]
    if None in files:
        return None
    files[2] = _file(folder, module, ".after_codegen.txt") or files[2]  # the same, with cycles
    report, assignment, text = (file.read_text(encoding="utf-8") for file in files)
    arguments = outputs = 0
    for size, kind in _ALLOCATION.findall(assignment):
        if "parameter " in kind:
            arguments += int(size)  # an output that takes its place is not counted again
        elif "maybe-live-out" in kind:
            outputs += int(size)
    placed = int(_PLACED.search(report)[1])
    return Layout(Memory(float(arguments), float(outputs), float(placed - arguments - outputs)), text)


def _analysed(compiled: Any) -> Memory:
    found = compiled.memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    code = float(found.generated_code_size_in_bytes)
    return Memory(float(arguments), float(outputs), float(found.temp_size_in_bytes), code)


def compile_whole(program: Planned, topology: Topology) -> Layout:
    """The layout of a program with its code, for a TPU slice, for GPUs or for devices of this machine.

    Raises:
      JaxRuntimeError: the compiler refused it.
    """
    lowered, flags = program.lower(), flags_of(topology.name)
    if topology.chip.platform != "tpu":
        elsewhere = gpus.OPTIONS if topology.chip.platform == "gpu" and not topology.here else {}
        compiled = lowered.compile(compiler_options=flags | elsewhere)
        return Layout(_analysed(compiled), compiled.as_text())
    with tempfile.TemporaryDirectory(prefix="lwd-plan-") as folder:
        compiled = lowered.compile(compiler_options=flags | _dump_flags(folder))
        layout = read_layout(Path(folder), module_name(lowered))
    memory = _analysed(compiled)
    if layout is None:  # another compiler, other files; as_text ends the process for TPU7x (libtpu 0.0.42)
        return Layout(memory, "")
    return layout._replace(memory=dataclasses.replace(layout.memory, code=memory.code))


# ------------------------------------------------------------------------------------------- in a process of its own


class _Refused(NamedTuple):
    """What the compiler said of a program that it did not take."""

    words: str


def _work(answers: Connection, folder: str, config: Config, slices: tuple[str, int], makers: Makers, name: str) -> None:
    """The process: it tells the module's name, then compiles until it is ended, refused or done."""
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    topology = open_topology(*slices)
    program = planned(config, mesh_of(config, topology), topology.chip.platform, makers, name)
    lowered = program.lower()
    answers.send(module_name(lowered))
    try:
        lowered.compile(compiler_options=flags_of(topology.name) | _dump_flags(folder))
    except jax.errors.JaxRuntimeError as error:
        answers.send(_Refused(str(error)))


def _wait(answers: Connection, folder: Path) -> Layout | None:
    """The layout as soon as it is written; None: the process ended without.

    Raises:
      JaxRuntimeError: the compiler refused the program.
    """
    module = ""
    while True:
        if answers.poll(_POLL):
            try:
                answer = answers.recv()
            except EOFError:
                return read_layout(folder, module)
            if isinstance(answer, _Refused):
                raise jax.errors.JaxRuntimeError(answer.words)
            module = answer
        if module and _is_laid_out(folder, module):
            return read_layout(folder, module)


def lay_out(config: Config, topology: Topology, makers: Makers, name: str) -> Layout:
    """The layout of one program of a run on a TPU slice, without its code.

    Raises:
      JaxRuntimeError: the compiler refused it.
      UserError: it ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    answers, ours = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="lwd-plan-") as folder:
        given = (ours, folder, config, (topology.name, topology.slices), makers, name)
        process = context.Process(target=_work, args=given, daemon=True)
        process.start()
        ours.close()  # the end is seen when the process's own is closed too
        try:
            layout = _wait(answers, Path(folder))
            if layout is None:
                process.join()  # it said its last word: let it end as it does
        finally:
            process.kill()
            process.join()
    if layout is None:
        raise UserError(
            f"The compiler's process for '{name}' ended with exit code {process.exitcode} and laid nothing out"
            f"{' (killed: is there enough memory?)' if process.exitcode == -9 else ''}."
        )
    return layout
