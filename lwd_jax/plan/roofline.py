"""The least time that one run of a program can take, and what binds it: arithmetic, memory, links, network.

Every bound is a bound: full peaks, perfect overlap. What a run really takes lies above it; `estimated` is nearer,
from the TPU compiler's own cycles where it wrote them.
"""

from dataclasses import dataclass

from lwd_jax.plan.result import Result
from lwd_jax.plan.topology import Topology
from lwd_jax.plan.traffic import BETWEEN_SLICES

KERNEL_SHARE = 0.5  # of the peak, that attention kernels reach on TPUs (0.4 to 0.6 are published)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one run.

    Attributes:
      compute: everything that is computed, recomputation and kernels included, at the peak.
      memory: what the chip's memory moves, at its bandwidth; None = not known, as below.
      links: what a chip sends to its neighbours.
      network: what a chip sends to other slices.
      estimated: the compiler's cycles, kernels at KERNEL_SHARE of the peak, and the traffic that is longer than both.
    """

    compute: float
    memory: float | None
    links: float | None
    network: float | None
    estimated: float | None
    pictures: int
    model: float
    peak: float  # FLOP/s of all chips
    chips: int

    @property
    def least(self) -> float:
        return max(bound for bound in self._bounds().values() if bound is not None)

    @property
    def binds(self) -> str:
        """The name of the largest bound."""
        known = {name: bound for name, bound in self._bounds().items() if bound is not None}
        return max(known, key=known.get)

    def _bounds(self) -> dict[str, float | None]:
        return {"compute": self.compute, "memory": self.memory, "links": self.links, "network": self.network}

    @property
    def cap(self) -> float:
        """The most that the utilisation of model FLOPs (MFU) can be."""
        return self.model / (self.peak * self.least)

    @property
    def pictures_per_second(self) -> float:
        """At the least time."""
        return self.pictures / self.least

    def chip_hours(self, runs: int) -> float:
        """Of so many runs, at the least time."""
        return runs * self.least * self.chips / 3600


def _seconds(size: float, bandwidth: float) -> float | None:
    return 0.0 if not size else size / bandwidth if bandwidth else None


def roofline(result: Result, topology: Topology) -> Roofline | None:
    """The bounds of a program; None where the chip's figures are not known."""
    chip = topology.chip
    if not chip.peak:
        return None
    known = result.moved is not None
    between = sum(row.sent for row in result.traffic if row.axes == BETWEEN_SLICES)
    near = sum(row.sent for row in result.traffic) - between
    peak = chip.peak * topology.chips
    share = chip.devices  # a chip's figures are shared by its devices
    links = _seconds(near * share, topology.link_bandwidth()) if known else None
    network = _seconds(between * share, chip.network) if known else None
    return Roofline(
        compute=result.counted.total / peak,
        memory=_seconds(result.moved * share, chip.hbm_bandwidth) if known else None,
        links=links,
        network=network,
        estimated=_estimated(result, topology, max(links or 0.0, network or 0.0)),
        pictures=result.pictures,
        model=result.model,
        peak=peak,
        chips=topology.chips,
    )


def _estimated(result: Result, topology: Topology, traffic: float) -> float | None:
    if not result.cycles or not topology.chip.clock:
        return None
    kernels = result.counted.kernels / (KERNEL_SHARE * topology.chip.peak * topology.chips)
    return max(result.cycles / topology.chip.clock + kernels, traffic)
