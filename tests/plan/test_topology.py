"""Laws: names of slices, their chips, hosts and links, and what is said where nothing can be compiled."""

import pytest

from lwd_jax.errors import UserError
from lwd_jax.plan import topology
from lwd_jax.plan.topology import CHIPS, GIB, open_topology, parse


@pytest.mark.parametrize(
    ("name", "slices", "chips", "hosts"),
    [("v5e:4x4", 1, 16, 4), ("v5p:2x2x4", 1, 16, 4), ("v5p:1x1x1", 1, 1, 1), ("v6e:16x16", 1, 256, 64)]
    + [("v5p:4x4x4", 2, 128, 32), ("v5e:2x4", 1, 8, 2), ("h200:8", 1, 8, 1), ("h200:16", 1, 16, 2)],
)
def test_chips_and_hosts(name, slices, chips, hosts):
    found = parse(name, slices)
    assert (found.chips, found.hosts) == (chips, hosts)


def test_tpu7x_has_two_devices_a_chip():
    assert parse("tpu7x:2x2x1").size == 8


@pytest.mark.parametrize(
    ("name", "links"),
    # A 4 x 4 slice of v5e is open: two links at its corners. 16 x 16 and whole cubes are closed.
    [("v5e:4x4", 2), ("v5e:16x16", 4), ("v5e:4x16", 3), ("v5e:1x1", 0), ("v5p:2x2x1", 2), ("v5p:2x2x4", 3)]
    + [("v5p:4x4x4", 6), ("v5p:4x4x8", 6), ("h200:8", 1), ("h200:1", 0)],
)
def test_links_of_the_worst_placed_chip(name, links):
    found = parse(name)
    assert found.link_bandwidth() == links * found.chip.link


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("v5e", 1, "KIND:SHAPE"),
        ("v5e:", 1, "KIND:SHAPE"),
        ("v5p:4x4", 1, "3 sides"),
        ("v5e:4x4x4", 1, "2 sides"),
        ("v5f:4x4", 1, "Did you mean 'v5"),
        ("v5e:0x4", 1, "nothing"),
        ("v5e:4x4", 0, "nothing"),
        ("h200:8", 2, "Only TPUs"),
    ],
)
def test_a_name_that_means_nothing_is_told(name, slices, said):
    with pytest.raises(UserError, match=said):
        parse(name, slices)


def test_public_figures():
    """FACTS of the vendor: bf16 TFLOP/s and GiB a chip; links of a chip together, both directions, GB/s."""
    assert {name: CHIPS[name].peak / 1e12 for name in ("v5e", "v5p", "v6e", "tpu7x", "h200")} == {
        "v5e": 197, "v5p": 459, "v6e": 918, "tpu7x": 2307, "h200": 989
    }  # fmt: skip
    assert {name: CHIPS[name].hbm / GIB for name in ("v5e", "v5p", "v6e")} == {"v5e": 16, "v5p": 95, "v6e": 32}
    both = {name: 2 * 2 * CHIPS[name].dimensions * CHIPS[name].link / 1e9 for name in ("v5e", "v5p", "v6e")}
    assert both == {"v5e": 400, "v5p": 1200, "v6e": 800}


def test_without_libtpu_the_topology_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    found = open_topology("v5e:4x4")
    assert found.devices is None and "pip install libtpu" in found.missing
    with pytest.raises(UserError, match="pip install libtpu"):
        topology._tpu_devices(found)


def test_devices_of_this_machine():
    assert len(open_topology("cpu:4").devices) == 4
    assert "512 such devices" in open_topology("cpu:512").missing
    assert "h200" in open_topology("h200:1").missing or open_topology("h200:1").devices


def test_gpus_that_are_not_here_need_their_compiler(monkeypatch):
    monkeypatch.setattr(topology.gpus, "has_compiler", lambda: False)
    found = open_topology("h200:512")
    assert found.devices is None and "needs 512 such GPUs here, or their compiler" in found.missing
    assert "lwd_jax[cuda]" in found.missing
    with pytest.raises(UserError, match="12 of them are no whole hosts"):
        topology.gpus.devices("h100", 12, 80e9, 3e12)


def test_every_gpu_can_be_described():
    assert set(topology.gpus.TARGETS) == {name for name, chip in CHIPS.items() if chip.platform == "gpu"}


def test_slices_of_libtpu():
    pytest.importorskip("libtpu")
    assert len(open_topology("v5p:1x1x1").devices) == 1
    found = open_topology("v5e:2x2", 2).devices
    assert len(found) == 8 and len({device.slice_index for device in found}) == 2
    with pytest.raises(UserError, match="knows no slice 'v5e:3x5'"):
        open_topology("v5e:3x5")
