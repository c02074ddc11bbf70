"""Laws: every bound is the work over the chips' public rate, worked by hand; the largest binds and caps utilisation."""

import dataclasses

import pytest

from lwd_jax.plan.count import Operations
from lwd_jax.plan.result import Memory, Result
from lwd_jax.plan.roofline import roofline
from lwd_jax.plan.topology import GIB, parse
from lwd_jax.plan.traffic import Traffic

V5E = parse("v5e:4x4")
RESULT = Result(
    program="train",
    pictures=16,
    mesh={"data": 1, "fsdp": 16, "context": 1, "tensor": 1},
    resident=2 * GIB,
    model=16 * 197e12,  # a second of 16 chips
    counted=Operations(12 * 197e12, 8 * 197e12),  # a quarter more
    memory=Memory(2 * GIB, 0, 3 * GIB),
    peak=5 * GIB,
    moved=819e9 / 2,
    cycles=1.5e9,
    traffic=(Traffic("all-gather", "fsdp", 10, 40e9), Traffic("all-reduce", "fsdp", 1, 10e9)),
)


def test_bounds_of_a_step():
    found = roofline(RESULT, V5E)
    assert found.compute == pytest.approx(1.25)
    assert found.memory == pytest.approx(0.5)
    assert found.links == pytest.approx(50e9 / (2 * 50e9))  # two links at a corner of an open slice
    assert found.network == 0
    assert (found.binds, found.least) == ("compute", pytest.approx(1.25))
    assert found.cap == pytest.approx(0.8)
    assert found.pictures_per_second == pytest.approx(16 / 1.25)
    assert found.chip_hours(3600) == pytest.approx(1.25 * 16)
    # A second of cycles, and the kernels' half second at half of the peak.
    assert found.estimated == pytest.approx(1 + 2 * 0.5)


def test_what_moves_most_binds():
    slow = dataclasses.replace(RESULT, traffic=(Traffic("all-gather", "fsdp", 1, 400e9),))
    assert (roofline(slow, V5E).binds, roofline(slow, V5E).least) == ("links", pytest.approx(4))
    assert roofline(slow, V5E).cap == pytest.approx(0.25)
    far = dataclasses.replace(RESULT, traffic=(Traffic("send", "slices", 1, 12.5e9),))
    assert (roofline(far, V5E).binds, roofline(far, V5E).links) == ("network", 0)
    assert roofline(far, V5E).network == pytest.approx(4)
    assert roofline(dataclasses.replace(RESULT, moved=819e10), V5E).binds == "memory"


def test_a_chip_of_two_devices_serves_both():
    """TPU7x: the programs of both devices share the chip's memory and links."""
    topology = parse("tpu7x:2x2x1")
    found = roofline(dataclasses.replace(RESULT, moved=7380e9, cycles=None), topology)
    assert found.memory == pytest.approx(2)
    assert found.links == pytest.approx(2 * 50e9 / (2 * 100e9))


def test_what_is_not_known_does_not_bind():
    unknown = dataclasses.replace(RESULT, moved=None, cycles=None, traffic=(), memory=None, peak=None)
    found = roofline(unknown, V5E)
    assert (found.memory, found.links, found.estimated, found.binds) == (None, None, None, "compute")
    assert unknown.fits(V5E) is None
    assert roofline(RESULT, parse("cpu:8")) is None


def test_a_tenth_is_left():
    assert RESULT.fits(V5E)
    assert not dataclasses.replace(RESULT, peak=14.5 * GIB).fits(V5E)
    assert dataclasses.replace(RESULT, peak=14.3 * GIB).fits(V5E)
    assert dataclasses.replace(RESULT, memory=None).fits(V5E) is False  # refused by the compiler
