"""`--mesh`, shared by the commands that run models over several devices."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.nn.sharding import AXES
from lwd_jax.parallel.mesh import check_batch, make_mesh


def open_mesh(text: str, batch: int) -> Mesh:
    """The mesh of "1,1,8,1": devices of this process along data, fsdp, context and tensor.

    Args:
      text: the numbers.
      batch: pictures at a time.

    Raises:
      UserError: it is not four numbers, or takes more devices than there are; the batch does not divide over it.
    """
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) != len(AXES) or not all(sizes):
        raise UserError(f"Write --mesh as devices along {','.join(AXES)}, such as 1,1,8,1, not as '{text}'.")
    count, devices = math.prod(sizes), jax.local_devices()
    if count > len(devices):
        raise UserError(f"--mesh {text} takes {count} devices, but {len(devices)} are here.")
    # Some of a TPU's devices may be no rectangle, which make_mesh would lay them out in.
    every = count == len(devices)
    mesh = make_mesh(configs.Mesh(*sizes), devices) if every else Mesh(np.reshape(devices[:count], sizes), AXES)
    check_batch(batch, mesh)
    return mesh
