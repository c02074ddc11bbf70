"""Reads a diffusers folder, checks that its weights are exactly those of the model, and writes a workdir to start from.

The workdir holds one model: the backbone, or (stage 1) the autoencoder.
"""

import shlex

import jax

from lwd_jax.cli.progress import progress
from lwd_jax.report.export import import_models

EXAMPLE = "lwd import --models stable-diffusion-3-medium --workdir runs/sd3"


def arguments(parser):
    parser.add_argument("--models", required=True, help="diffusers folder: a pipeline, or one model")
    parser.add_argument("--workdir", required=True, help="folder to write: new, or empty")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=0, help="1: the autoencoder; 2: the backbone")
    parser.add_argument(
        "--adapter", default="", help="file of adapters over the backbone, as diffusers and PEFT save it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import")


def run(args):
    jax.config.update("jax_platforms", "cpu")  # an accelerator is left alone, as by `lwd export`
    with progress() as show:
        config = import_models(
            args.models,
            args.workdir,
            stage=args.stage,
            adapter=args.adapter,
            overwrite=args.overwrite,
            on_progress=show,
        )
    field = "autoencoder" if config.stage == 1 else "backbone"
    variant = getattr(config.models, f"{field}_variant")
    name = f"{field} ({variant})" if variant else field
    if args.adapter:
        name = f"adapters and, by its place, their {name}"
    given = shlex.quote(f"--config.models.{field}={args.workdir}")
    print(f"Imported the {name} to {args.workdir}. Next: lwd train {given} ...")
