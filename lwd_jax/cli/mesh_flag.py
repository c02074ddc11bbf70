"""`--mesh`, shared by the commands that run models over several devices."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.nn.sharding import AXES
from lwd_jax.parallel.mesh import make_mesh


def open_mesh(text: str) -> Mesh:
    """The mesh of "1,1,8,1": devices of this process along data, fsdp, context and tensor.

    Raises:
      UserError: it is not four numbers, or takes more devices than there are.
    """
    sizes = text.split(",")
    if len(sizes) != len(AXES) or not all(size.isdecimal() and int(size) for size in sizes):
        raise UserError(f"Write --mesh as devices along {','.join(AXES)}, such as 1,1,8,1, not as '{text}'.")
    count, devices = math.prod(map(int, sizes)), jax.local_devices()
    if count > len(devices):
        raise UserError(f"--mesh {text} takes {count} devices, but {len(devices)} are here.")
    if count == len(devices):
        return make_mesh(configs.Mesh(*map(int, sizes)), devices)
    return Mesh(np.reshape(devices[:count], [int(size) for size in sizes]), AXES)  # of a TPU's they may be no rectangle
