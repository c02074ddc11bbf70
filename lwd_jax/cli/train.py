"""Trains either stage. The same command resumes: from the newest checkpoint, bit for bit, data order included.

SIGTERM (a preempted slice) and Ctrl-C save a checkpoint before the command ends, with exit code 128 + the signal's
number. A run of several processes gets this command on every host, with a workdir that they share; they find each other
by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by SLURM, or as the hosts of a TPU slice. A signal to
one of them saves and stops all at the same step. Exit code 2 is a mistake, which another try would meet again; 75 a
failure that may pass: a full disk, a mount that went away, processes that did not all come, a mistake that one process
alone met. The launchers run the command again then.
"""

import os
import shlex
import signal

import jax

from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import Config, to_json, without_effect
from lwd_jax.data import dataset, latents
from lwd_jax.errors import UserError
from lwd_jax.files import locate
from lwd_jax.parallel import processes
from lwd_jax.report import pipeline
from lwd_jax.report.previews import make_previews
from lwd_jax.train.checkpoint import saved_steps
from lwd_jax.train.loop import Outcome
from lwd_jax.train.loop import run as loop
from lwd_jax.train.models import TRAINED
from lwd_jax.train.setup import make_setup

EXAMPLE = (
    "lwd train --config=configs/stage2_sd3_1024.py --workdir=runs/stage2 --config.data.latents=data/latents "
    "--config.models.backbone=sd3-medium --config.models.autoencoder=runs/stage1"
)

# What other commands write, by the file that tells.
_OTHERS = {
    dataset.INDEX: "a dataset",
    latents.METADATA: "latents",
    pipeline.MANIFEST: "an export",
    "model_index.json": "a diffusers pipeline",
}


def arguments(parser) -> None:
    parser.add_argument("--config", required=True, help="file of configs/, or a config.json; --config.a.b=value")
    parser.add_argument(
        "--workdir", required=True, help="folder of the run, or gs://BUCKET/FOLDER: new, or the run to resume"
    )
    parser.add_argument(
        "--distributed", choices=processes.MODES, nargs="?", const="on", default="auto",
        help="join the other processes of the run: auto (the default) where the environment names them, as above; on "
        "(also plain --distributed) wherever jax can find them, under Open MPI say; off: never",
    )  # fmt: skip
    parser.add_argument(
        "--join_timeout", type=int, default=processes.WAIT, metavar="SECONDS",
        help="how long to wait for all processes to come (%(default)s)",
    )  # fmt: skip


def train(config: Config, workdir: str | os.PathLike) -> Outcome:
    """Runs or resumes the training of a config in a workdir.

    Raises:
      UserError: whatever is missing or does not fit, and which.
    """
    workdir = locate(workdir)
    for name, what in _OTHERS.items():
        if (workdir / name).is_file():
            raise UserError(f"'{workdir}' holds {what}; name a folder of its own for the run.")
    processes.agree(
        f"{to_json(config)} {workdir}",
        "The processes of this run were not started with the same config and workdir: give each the same command.",
    )
    setup = make_setup(config)
    if jax.process_index() == 0 and not saved_steps(workdir):
        field = TRAINED[config.stage].field
        if setup.params is None:
            print(f"The {field} starts from random weights: models.{field} names nothing to start from.")
        for sentence in without_effect(config):
            print(sentence)
    previews = make_previews(config, setup, workdir) if config.training.preview_every else None
    return loop(
        setup.program,
        setup.batches,
        config,
        workdir,
        setup.mesh,
        description=setup.description,
        params=setup.params,
        previews=previews,
    )


def run(args) -> int:
    config = read_config(args.config, args.overrides)
    processes.join(args.distributed, args.join_timeout)
    try:
        outcome = train(config, args.workdir)
    except Exception as error:
        processes.leave(error)
        raise
    if outcome.signal and outcome.step < config.training.steps:
        name = signal.Signals(outcome.signal).name
        last = (
            f"Stopped by {name} at step {outcome.step} of {config.training.steps}, saved in {args.workdir}. Next: the "
            "same command resumes."
        )
    else:
        following = {1: "lwd encode --dataset DATASET --out LATENTS", 2: "lwd sample --prompt TEXT --out D"}
        models = shlex.quote(args.workdir)
        last = (
            f"Trained to step {outcome.step}, saved in {args.workdir}. Next: {following[config.stage]} "
            f"--models {models}"
        )
    if jax.process_index() == 0:
        print(last)
    return 128 + outcome.signal if outcome.signal else 0
