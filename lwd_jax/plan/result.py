"""What is known of one program on one topology."""

from dataclasses import dataclass

from lwd_jax.plan.count import Operations
from lwd_jax.plan.topology import Topology
from lwd_jax.plan.traffic import Traffic

MARGIN = 0.1  # of the memory that is left to the runtime, to fragmentation and to what runs beside the program


@dataclass(frozen=True)
class Memory:
    """Bytes per chip. What is donated lies in `arguments` and is not counted again in `outputs`; `code` is None where
    it was not made.
    """

    arguments: float
    outputs: float
    temporaries: float
    code: float | None = None

    @property
    def peak(self) -> float:
        return self.arguments + self.outputs + self.temporaries + (self.code or 0.0)


@dataclass(frozen=True)
class Result:
    """What is known of one program on one topology; None where it is not.

    Attributes:
      program, pictures: which, and how many pictures one run of it works on.
      mesh: axis -> size.
      resident: bytes per chip of its arguments, by shape evaluation.
      memory: by the compiler.
      peak: bytes per chip, by the compiler: of a program that fits no chip, what it asked for.
      model: FLOPs of one run, by formula; nothing recomputed.
      counted: of one run, all that is computed.
      moved: bytes per chip to and from its memory.
      cycles: estimated by the compiler, per chip.
      traffic: between chips.
      seconds: that tracing and compiling took.
      missing: what is not known, and why.
    """

    program: str
    pictures: int
    mesh: dict[str, int]
    resident: float
    model: float
    counted: Operations
    memory: Memory | None = None
    peak: float | None = None
    moved: float | None = None
    cycles: float | None = None
    traffic: tuple[Traffic, ...] = ()
    seconds: float = 0.0
    missing: str = ""

    def fits(self, topology: Topology) -> bool | None:
        """Whether the peak leaves the margin; None: not known."""
        if self.peak is None or not topology.chip.hbm:
            return None
        return self.memory is not None and self.peak <= limit(topology)


def limit(topology: Topology) -> float:
    """Bytes per device that a program may use."""
    return (1 - MARGIN) * topology.chip.hbm / topology.chip.devices
