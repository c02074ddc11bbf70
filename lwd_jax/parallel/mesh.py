"""The device mesh and which part of a batch each process feeds."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.nn.sharding import AXES


def mesh_shape(config: configs.Mesh, devices: int) -> tuple[int, ...]:
    """Devices per axis, with the -1 filled in.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    written = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    if known < 1 or devices % known:
        raise UserError(
            f"The mesh ({written}) does not divide over {devices} device(s); set one of its axes to -1 to use them."
        )
    shape = tuple(devices // known if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    if math.prod(shape) != devices:
        raise UserError(
            f"The mesh ({written}) uses {math.prod(shape)} of {devices} devices; set one axis to -1 to use the rest."
        )
    return shape


def make_mesh(config: configs.Mesh, devices=None) -> Mesh:
    """The mesh (data, fsdp, context, tensor) over all devices, or those given.

    `jax.sharding.Mesh` makes Auto axes, where the compiler places the intermediate values; `jax.make_mesh` would make
    Explicit ones. Neighbours in the last axes are neighbours in the machine: tensor and context talk most. Slices of a
    multi-slice job are told apart along `data`, the axis that talks least.

    Raises:
      UserError: the axes do not multiply to the number of devices, or `data` does not divide into the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(shape)
    elif slices > 1:
        if shape[0] % slices:
            raise UserError(f"mesh.data is {shape[0]}, which does not divide over the {slices} slices there are.")
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def abstract_mesh(sizes: tuple[int, ...]) -> AbstractMesh:
    """A mesh of those sizes (data, fsdp, context, tensor) without devices, for shape evaluation; Auto axes as those of
    `make_mesh`: AbstractMesh's own default is Explicit from jax 0.12 on.
    """
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform_of(mesh: Mesh | AbstractMesh) -> str | None:
    """The name of the devices' platform: cpu, gpu or tpu; None of a mesh without devices."""
    return None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


def over(mesh: Mesh, function: Callable) -> Callable:
    """`function`, called under the mesh, which models read (nn.sharding)."""

    def call(*given):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*given)

    return call


def batch_parts(mesh: Mesh) -> int:
    """How many parts the first axis of a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(size: int, mesh: Mesh | AbstractMesh) -> None:
    """Checks that a batch of so many pictures divides over the mesh.

    Raises:
      UserError: it does not.
    """
    if size % batch_parts(mesh):
        raise UserError(f"A batch of {size} pictures does not divide over data x fsdp = {batch_parts(mesh)} devices.")


class Share(NamedTuple):
    """What each process reads of every global batch.

    A batch is split into as many blocks of rows as the mesh has places along data and fsdp; on a TPU slice the blocks
    of one host need not be neighbours.

    Attributes:
      index: which part this process reads.
      blocks: [parts, blocks per part]: the numbers of each part's blocks, ascending.
    """

    index: int
    blocks: np.ndarray


def share_of_process(processes: np.ndarray, process: int) -> Share:
    """The part of one process.

    Processes that share a row of the mesh along `context` or `tensor` hold the same pictures and read the same part.

    Args:
      processes: [data fsdp context tensor], the process index of every device of the mesh.
      process: which one.

    Raises:
      UserError: the pictures of the processes overlap without being the same.
    """
    rows = processes.reshape(processes.shape[0] * processes.shape[1], -1)
    held = {int(p): tuple(map(int, np.flatnonzero((rows == p).any(axis=1)))) for p in np.unique(rows)}
    parts = sorted(set(held.values()))
    if sorted(row for part in parts for row in part) != list(range(len(rows))) or len(set(map(len, parts))) != 1:
        raise UserError("The mesh makes processes share some pictures only; put fewer devices on context or tensor.")
    return Share(parts.index(held[process]), np.array(parts))


def process_share(mesh: Mesh) -> Share:
    """`share_of_process` for this process."""
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return share_of_process(processes, jax.process_index())
