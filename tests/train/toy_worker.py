"""One process of a toy run: `python toy_worker.py WORKDIR STEPS SAVE_EVERY`. The environment says which one."""

import functools
import sys

import numpy as np
from toy_stage import ToyBatches, toy_batch, toy_config, toy_stage

from lwd_jax import config as configs
from lwd_jax.errors import UserError
from lwd_jax.parallel import processes
from lwd_jax.parallel.mesh import make_mesh, process_share
from lwd_jax.train.loop import run
from lwd_jax.train.program import build_program


@functools.cache
def _program(mesh):
    return build_program(toy_config(), mesh, toy_stage())


def toy_run(workdir, steps: int, save_every: int = 2, devices=None):
    """Trains the toy on all devices of all processes, or on those given."""
    config = toy_config(training={"steps": steps, "save_every": save_every, "log_every": 1})
    mesh = make_mesh(configs.Mesh(), devices)
    share = process_share(mesh)
    rows = np.arange(8).reshape(share.blocks.size, -1)[share.blocks[share.index]].reshape(-1)
    batches = ToyBatches(lambda index: {name: array[rows] for name, array in toy_batch(index).items()})
    return run(_program(mesh), batches, config, workdir, mesh, description="{}")


if __name__ == "__main__":
    try:
        processes.join(timeout=60)
        outcome = toy_run(sys.argv[1], *map(int, sys.argv[2:]))
    except UserError as mistake:
        sys.exit(f"lwd: {mistake}")
    print(f"reached {outcome.step}", flush=True)
    sys.exit(128 + outcome.signal if outcome.signal else 0)
