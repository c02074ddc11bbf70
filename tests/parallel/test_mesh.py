import jax
import numpy as np
import pytest

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.parallel.mesh import AXES, abstract_mesh, make_mesh, mesh_shape, share_of_process


@pytest.mark.parametrize(
    "axes, shape",
    [
        ({}, (1, 8, 1, 1)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"context": 4, "fsdp": -1}, (1, 2, 4, 1)),
    ],
)
def test_mesh_has_the_axes_asked_for(axes, shape):
    mesh = make_mesh(configs.Mesh(**axes))
    assert mesh.axis_names == AXES and mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_without_devices_is_like_one_with():
    made, real = abstract_mesh((2, 2, 1, 2)), make_mesh(configs.Mesh(data=2, fsdp=2, tensor=2))
    assert made.shape == real.shape and made.axis_types == real.axis_types


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 2, "fsdp": 2}, {"data": 16, "fsdp": 1}, {"tensor": 0}])
def test_mesh_that_does_not_fit_is_refused(axes):
    with pytest.raises(UserError, match="mesh"):
        mesh_shape(configs.Mesh(**axes), 8)


def test_mesh_over_some_devices():
    assert make_mesh(configs.Mesh(), jax.devices()[:2]).devices.shape == (1, 2, 1, 1)


def shares(processes):
    found = [share_of_process(processes, p) for p in range(int(processes.max()) + 1)]
    assert all((share.blocks == found[0].blocks).all() for share in found)
    return [share.index for share in found], found[0].blocks.tolist()


def test_every_process_reads_its_own_rows_once():
    processes = np.arange(8).reshape(4, 2, 1, 1) // 2
    assert shares(processes) == ([0, 1, 2, 3], [[0, 1], [2, 3], [4, 5], [6, 7]])


def test_processes_that_share_pictures_read_the_same_part():
    processes = np.repeat(np.arange(4).reshape(2, 1, 2, 1), 2, axis=3)  # pairs hold halves of the same pictures
    assert shares(processes) == ([0, 0, 1, 1], [[0], [1]])


def test_rows_of_a_host_need_not_be_neighbours():
    """The order of a v5e 4x4 slice, laid out as a ring of 16: the hosts are its quarters."""
    ring = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (1, 2), (1, 1), (2, 1), (2, 2), (2, 3), (3, 3), (3, 2), (3, 1)]
    ring += [(3, 0), (2, 0), (1, 0)]
    processes = np.array([2 * (row // 2) + column // 2 for row, column in ring]).reshape(1, 16, 1, 1)
    indices, blocks = shares(processes)
    assert indices == [0, 1, 2, 3] and blocks == [[0, 1, 6, 15], [2, 3, 4, 5], [7, 12, 13, 14], [8, 9, 10, 11]]


def test_processes_whose_pictures_overlap_are_refused():
    with pytest.raises(UserError, match="process"):
        share_of_process(np.array([0, 1, 1, 2]).reshape(2, 1, 2, 1), 0)
