"""A program compiled ahead of time: its memory on a chip, what it moves and what it computes."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from lwd_jax.config import Config
from lwd_jax.plan import cache
from lwd_jax.plan.hlo import Module, estimated_cycles, memory_bytes
from lwd_jax.plan.layout import compile_whole, lay_out
from lwd_jax.plan.programs import Makers, Planned, mesh_of, planned
from lwd_jax.plan.result import Result
from lwd_jax.plan.topology import Topology
from lwd_jax.plan.traffic import traffic_of

NO_CODE = (
    "The compiler was ended before it made the code (--fast), which takes 0.1 to 0.2 GiB more, of stage 1 up to 1: no "
    "estimate of cycles, and no proof that the code can be made."
)


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


def compile_program(program: Planned, mesh: Any, topology: Topology, fast: Callable | None = None) -> Result:
    """Compiles a program for the devices of a topology, with the flags of its kind; what the compiler refuses is a
    result too.

    Args:
      fast: () -> its Layout without code, to be asked instead.
    """
    result = evaluate(program, mesh, topology)
    start = time.perf_counter()
    try:
        layout = fast() if fast else compile_whole(program, topology)
    except jax.errors.JaxRuntimeError as error:
        asked = _asked_for(error)
        missing = "" if asked else f"Does not compile: {' '.join(str(error).split())[:200]}"
        return dataclasses.replace(result, peak=asked, seconds=time.perf_counter() - start, missing=missing)
    seconds = time.perf_counter() - start
    result = dataclasses.replace(result, memory=layout.memory, peak=layout.memory.peak, seconds=seconds)
    if not layout.text:
        return dataclasses.replace(result, missing="The compiled program cannot be read: no traffic, no memory moved.")
    module = Module(layout.text)
    return dataclasses.replace(
        result,
        moved=memory_bytes(module),
        cycles=estimated_cycles(module),
        traffic=tuple(traffic_of(module, dict(mesh.shape))),
        missing=NO_CODE if fast else "",
    )


def plan_program(
    config: Config, topology: Topology, makers: Makers, name: str, fresh: bool = False, fast: bool = False
) -> Result:
    """One program of a run on a topology: compiled where there are devices to compile for, or kept from an earlier
    time.

    Args:
      fresh: compile it whatever is kept.
      fast: for a TPU slice, end the compiler before it makes code, unless a whole result is kept.

    Raises:
      UserError: the config and the topology do not fit.
    """
    mesh = mesh_of(config, topology)
    program = planned(config, mesh, topology.chip.platform, makers, name)
    if topology.devices is None:
        return evaluate(program, mesh, topology)
    if topology.here:  # the key says nothing of this machine
        return compile_program(program, mesh, topology)
    key = cache.key_of(config, topology, name, program.arguments)
    early = f"{key}-fast"
    kept = None if fresh else cache.read(key) or (cache.read(early) if fast else None)
    if kept is not None:
        return kept
    ended_early = partial(lay_out, config, topology, makers, name) if fast else None
    result = compile_program(program, mesh, topology, ended_early)
    cache.write(early if fast else key, result)
    return result
