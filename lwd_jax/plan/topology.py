"""The machines that a plan is made for: chip kinds with their public figures, and slices by name.

A name is KIND:SHAPE, the shape in chips: `v5e:4x4`, `v5p:2x2x4`, `v6e:16x16`; of GPUs their number, `h200:8`. libtpu
compiles for the TPU slices on any machine, and the extra [cuda] for the GPUs. `cpu:8` is eight (simulated) devices of
this machine.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lwd_jax.errors import UserError, choose
from lwd_jax.plan import gpus

GIB = 2**30
_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")


@dataclass(frozen=True)
class Chip:
    """One kind of chip, per chip.

    Attributes:
      platform: of jax: "tpu", "gpu", "cpu".
      peak: dense bfloat16 FLOP/s; 0 = not known, as of all the figures below.
      hbm: bytes of memory.
      hbm_bandwidth: bytes/s.
      link: bytes/s of one link to a neighbour, in one direction.
      network: bytes/s of the data centre network, between slices, in one direction.
      clock: Hz, that the compiler's estimated cycles are counted in.
      dimensions: of the torus; 1 = all chips are joined alike (a switch).
      devices: of jax, in one chip.
    """

    platform: str
    peak: float = 0.0
    hbm: float = 0.0
    hbm_bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    clock: float = 0.0
    dimensions: int = 1
    devices: int = 1


# TPU: the tables "System architecture" of cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. They give the links of a chip
# together and in both directions: 400, 1200, 800 and 1200 GB/s over 4, 6, 4 and 6 links. Network: v5p 50 and tpu7x
# 100 Gbit/s a chip as printed; v5e and v6e 6.4 and 25.6 Tbit/s a pod of 256. The clocks are inferred from estimates of
# single matrix products against the peak, not published. GPU: NVIDIA's data sheets, dense bfloat16; NVLink 900 GB/s
# in both directions together.
CHIPS = {
    "v5e": Chip("tpu", 197e12, 16 * GIB, 819e9, 50e9, 3.125e9, 1.5e9, dimensions=2),
    "v5p": Chip("tpu", 459e12, 95 * GIB, 2765e9, 100e9, 6.25e9, 1.75e9, dimensions=3),
    "v6e": Chip("tpu", 918e12, 32 * GIB, 1638e9, 100e9, 12.5e9, 1.75e9, dimensions=2),
    "tpu7x": Chip("tpu", 2307e12, 192 * GIB, 7380e9, 100e9, 12.5e9, dimensions=3, devices=2),
    "a100": Chip("gpu", 312e12, 80e9, 2039e9, 300e9),
    "h100": Chip("gpu", 989e12, 80e9, 3350e9, 450e9),
    "h200": Chip("gpu", 989e12, 141e9, 4800e9, 450e9),
    "cpu": Chip("cpu"),
}
NO_LIBTPU = "Compiling for a TPU slice needs its compiler: pip install libtpu."
_HOST = (2, 2, 1)  # chips of the host that libtpu assumes, along each side


class Topology(NamedTuple):
    """Some slices of one kind.

    Attributes:
      name: as it was given.
      chip: its figures.
      sides: chips along each side of one slice.
      slices: how many.
      devices: of jax, to compile for; None where this machine cannot.
      here: they are this machine's own, which run what is compiled for them.
      missing: why it cannot; "" where it can.
    """

    name: str
    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1
    devices: list[Any] | None = None
    here: bool = False
    missing: str = ""

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.sides)

    @property
    def size(self) -> int:
        """Devices of jax."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Hosts of at most 2 x 2 chips (TPU), of 8 (GPU)."""
        if self.chip.platform != "tpu":
            return math.ceil(self.chips / 8)
        return self.slices * math.prod(math.ceil(side / most) for side, most in zip(self.sides, _HOST))

    def link_bandwidth(self) -> float:
        """Bytes/s that a chip at the worst place sends to its neighbours: one link for every side longer than 1, two
        where the torus closes.

        v5e and v6e close at 16 chips, v5p and tpu7x where all sides are multiples of 4 (whole cubes).
        """
        if self.chip.dimensions == 1:
            return self.chip.link if self.chips > 1 else 0.0
        cubes = all(side % 4 == 0 for side in self.sides)
        closed = [side == 16 if self.chip.dimensions == 2 else cubes for side in self.sides]
        return self.chip.link * sum(1 + closes for side, closes in zip(self.sides, closed) if side > 1)


def parse(name: str, slices: int = 1) -> Topology:
    """The topology of a name, without devices.

    Raises:
      UserError: an unknown chip, a shape of another number of sides, no slices.
    """
    match = _NAME.fullmatch(name.lower())
    if not match:
        raise UserError(f"A topology is KIND:SHAPE, such as v5e:4x4, v5p:2x2x4 or h200:8, not '{name}'.")
    chip = choose(CHIPS, match[1], "chip kind")
    sides = tuple(map(int, match[2].split("x")))
    if len(sides) != chip.dimensions:
        example = "x".join("442"[: chip.dimensions])
        raise UserError(f"The shape of {match[1]} has {chip.dimensions} sides (as {match[1]}:{example}), not '{name}'.")
    if min(sides) < 1 or slices < 1:
        raise UserError(f"There is nothing in {slices} slices of '{name}'.")
    if slices > 1 and chip.platform != "tpu":
        raise UserError(f"Only TPUs come in slices: --num_slices is {slices}, but the topology is '{name}'.")
    return Topology(name.lower(), chip, sides, slices)


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _tpu_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, of libtpu; no TPU is touched.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    if not has_libtpu():
        raise UserError(NO_LIBTPU)
    # Without a metadata server the first query waits for minutes; two plans may run at a time; names of hosts are not
    # asked for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")  # or libtpu warns; the slice comes out the same
    from jax.experimental import topologies

    options = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    host = tuple(map(min, (*topology.sides, 1), _HOST))  # a slice smaller than a host must say so
    if host != _HOST:
        options["chips_per_host_bounds"] = list(host)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu knows no slice '{topology.name}': {str(error).splitlines()[0]}") from error
    return list(description.devices)


def _local_devices(topology: Topology) -> list[Any]:
    """Devices of this machine.

    Raises:
      UserError: there are too few of that kind.
    """
    kind = topology.name.partition(":")[0]
    found = [d for d in jax.devices() if d.platform == topology.chip.platform]
    if kind != "cpu":
        found = [d for d in found if kind in d.device_kind.lower()]
    if len(found) < topology.size:
        more = " (XLA_FLAGS=--xla_force_host_platform_device_count=N simulates more)" if kind == "cpu" else ""
        raise UserError(
            f"Compiling for {topology.name} needs {topology.size} such devices here, not {len(found)}{more}."
        )
    return found[: topology.size]


def open_topology(name: str, slices: int = 1) -> Topology:
    """The topology of a name, with devices to compile for where this machine can; else `missing` says why not.

    Raises:
      UserError: the name means nothing, or libtpu knows no such slice.
    """
    topology = parse(name, slices)
    if topology.chip.platform == "tpu":
        if not has_libtpu():
            return topology._replace(missing=NO_LIBTPU)
        return topology._replace(devices=_tpu_devices(topology))
    if topology.chip.platform == "gpu":
        gpus.allow_none()
    try:
        return topology._replace(devices=_local_devices(topology), here=True)
    except UserError as error:
        return _gpus_elsewhere(topology) if topology.chip.platform == "gpu" else topology._replace(missing=str(error))


def _gpus_elsewhere(topology: Topology) -> Topology:
    """With GPUs to compile for that are not here, or why there are none."""
    kind, chip = topology.name.partition(":")[0], topology.chip
    if not gpus.has_compiler():
        return topology._replace(missing=gpus.NO_COMPILER.format(name=topology.name, count=topology.chips))
    return topology._replace(devices=gpus.devices(kind, topology.chips, chip.hbm, chip.hbm_bandwidth))
