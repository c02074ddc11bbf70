"""A program compiled ahead of time: its memory on a chip, what it moves and what it computes."""

import dataclasses
import math
import re
import tempfile
import time
from typing import Any

import jax
from etils.epath import Path

from lwd_jax.config import Config
from lwd_jax.parallel.mesh import abstract_mesh, make_mesh, mesh_shape
from lwd_jax.plan import cache
from lwd_jax.plan.flags import flags_of
from lwd_jax.plan.hlo import Module, estimated_cycles, memory_bytes
from lwd_jax.plan.programs import Makers, Planned, planned
from lwd_jax.plan.result import Memory, Result
from lwd_jax.plan.topology import Topology
from lwd_jax.plan.traffic import traffic_of


def mesh_of(config: Config, topology: Topology) -> Any:
    """The run's mesh on a topology; an AbstractMesh where there are no devices to compile for.

    Raises:
      UserError: the mesh does not fit the number of chips.
    """
    if topology.devices is not None:
        return make_mesh(config.mesh, topology.devices)
    return abstract_mesh(mesh_shape(config.mesh, topology.size))


def resident_bytes(arguments: Any) -> float:
    """Bytes per chip of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(arguments)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


_EXHAUSTED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _asked_for(error: jax.errors.JaxRuntimeError) -> float | None:
    """Bytes of HBM that a program asked for which the TPU compiler refused for its size; None = it was refused for
    another reason (the fast memory of a kernel, say).
    """
    found = _EXHAUSTED.search(str(error))
    return float(found[1]) * _UNITS[found[2]] if found else None


_PLACED = re.compile(r"^Memory Space: default \(color=0\)\nTotal bytes: (\d+)", re.MULTILINE)


def _compiled(program: Planned, topology: Topology) -> tuple[Any, int | None]:
    """(the executable, bytes that it takes of a chip's memory beside its code; None where memory_analysis tells them).

    Of TPUs it does not: it gave SD3-medium's step 2.58 GiB of temporaries (jaxlib 0.10.2, libtpu 0.0.42) of which the
    compiler's own report knows 1.79, and its peak counts the fast memory on the chip too. So the report is read.
    """
    flags = flags_of(topology.name)
    if topology.chip.platform != "tpu":
        return program.lower().compile(compiler_options=flags), None
    with tempfile.TemporaryDirectory(prefix="lwd-plan-") as folder:
        flags = flags | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = program.lower().compile(compiler_options=flags)
        reports = [file.read_text(encoding="utf-8") for file in Path(folder).glob("*memory-usage-report.txt")]
    return compiled, max((int(found[1]) for found in map(_PLACED.search, reports) if found), default=None)


def _memory(compiled: Any, placed: int | None = None) -> Memory:
    found = compiled.memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    temporaries = found.temp_size_in_bytes if placed is None else placed - arguments - outputs
    return Memory(float(arguments), float(outputs), float(temporaries), float(found.generated_code_size_in_bytes))


def _text(compiled: Any, topology: Topology) -> str:
    """The compiled program; "" where asking for it would end the process (TPU7x, libtpu 0.0.42: a failed check)."""
    return "" if topology.name.startswith("tpu7x") else compiled.as_text()


def evaluate(program: Planned, mesh: Any, topology: Topology) -> Result:
    """What is known without compiling."""
    return Result(
        program=program.name,
        pictures=program.pictures,
        mesh=dict(mesh.shape),
        resident=resident_bytes(program.arguments),
        model=float(program.model()),
        counted=program.count(),
        missing=topology.missing,
    )


def compile_program(program: Planned, mesh: Any, topology: Topology) -> Result:
    """Compiles a program for the devices of a topology, with the flags of its kind; what the compiler refuses is a
    result too.
    """
    result = evaluate(program, mesh, topology)
    start = time.perf_counter()
    try:
        compiled, placed = _compiled(program, topology)
    except jax.errors.JaxRuntimeError as error:
        asked = _asked_for(error)
        missing = "" if asked else f"Does not compile: {' '.join(str(error).split())[:200]}"
        return dataclasses.replace(result, peak=asked, seconds=time.perf_counter() - start, missing=missing)
    seconds = time.perf_counter() - start
    memory, text = _memory(compiled, placed), _text(compiled, topology)
    result = dataclasses.replace(result, memory=memory, peak=memory.peak, seconds=seconds)
    if not text:
        return dataclasses.replace(result, missing="The compiled program cannot be read: no traffic, no memory moved.")
    module = Module(text)
    return dataclasses.replace(
        result,
        moved=memory_bytes(module),
        cycles=estimated_cycles(module),
        traffic=tuple(traffic_of(module, dict(mesh.shape))),
    )


def plan_program(config: Config, topology: Topology, makers: Makers, name: str, fresh: bool = False) -> Result:
    """One program of a run on a topology: compiled where there are devices to compile for, or kept from an earlier
    time.

    Args:
      fresh: compile it whatever is kept.

    Raises:
      UserError: the config and the topology do not fit.
    """
    mesh = mesh_of(config, topology)
    program = planned(config, mesh, topology.chip.platform, makers, name)
    if topology.devices is None:
        return evaluate(program, mesh, topology)
    if topology.chip.platform != "tpu":  # other devices are this machine's own, of which the key says nothing
        return compile_program(program, mesh, topology)
    key = cache.key_of(config, topology, name, program.arguments)
    kept = None if fresh else cache.read(key)
    if kept is not None:
        return kept
    result = compile_program(program, mesh, topology)
    cache.write(key, result)
    return result
