"""Trains either stage. The same command resumes: from the newest checkpoint, bit for bit, data order included.

SIGTERM (a preempted slice) and Ctrl-C save a checkpoint before the command ends.
"""

import shlex
import signal
from pathlib import Path

import jax

from lwd_jax.cli.config_flag import read_config
from lwd_jax.config import Config
from lwd_jax.report.previews import make_previews
from lwd_jax.train.loop import Outcome
from lwd_jax.train.loop import run as loop
from lwd_jax.train.setup import make_setup

EXAMPLE = "lwd train --config=configs/stage2_sd3_1024.py --workdir=runs/stage2 --config.optimizer.learning_rate=1e-5"


def arguments(parser) -> None:
    parser.add_argument("--config", required=True, help="file of configs/, or a config.json; --config.a.b=value")
    parser.add_argument("--workdir", required=True, help="folder of the run: new, or the run to resume")
    parser.add_argument(
        "--distributed", action="store_true", help="one of several hosts of the same run; each gets this command"
    )


def train(config: Config, workdir: str | Path) -> Outcome:
    """Runs or resumes the training of a config in a workdir.

    Raises:
      UserError: whatever is missing or does not fit, and which.
    """
    setup = make_setup(config)
    previews = make_previews(config, setup, Path(workdir)) if config.training.preview_every else None
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
    if args.distributed:
        jax.distributed.initialize()
    outcome = train(config, args.workdir)
    if outcome.signal:
        name = signal.Signals(outcome.signal).name
        print(
            f"Stopped by {name} at step {outcome.step} of {config.training.steps}, saved in {args.workdir}. Next: the "
            "same command resumes."
        )
        return 128 + outcome.signal
    following = {1: "lwd encode --dataset DATASET --out LATENTS", 2: "lwd sample --prompt TEXT --out D"}[config.stage]
    models = shlex.quote(args.workdir)
    print(f"Trained to step {outcome.step}, saved in {args.workdir}. Next: {following} --models {models}")
    return 0
