"""Writes the models of a run as a diffusers folder with a model card, for PyTorch and for `lwd sample`."""

import shlex

import jax

from lwd_jax.cli.progress import progress
from lwd_jax.report.export import DTYPES, FORMS, export

EXAMPLE = "lwd export --workdir runs/stage2 --out sd3-lwd-2k"


def arguments(parser):
    parser.add_argument("--workdir", required=True, help="of the run, of either stage")
    parser.add_argument("--out", required=True, help="folder to write: new, or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", help="the averaged weights, if the run has them (the default)")
    which.add_argument("--plain", action="store_true", help="the weights as they were last, not averaged")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the files (default %(default)s)")
    parser.add_argument("--autoencoder", default="", help="folder or workdir of another autoencoder than the run's")
    parser.add_argument(
        "--form", default="merged", choices=FORMS,
        help="of a run of adapters: merged, a pipeline with the adapters in its weights (default); adapter, the "
        "adapters alone as diffusers and PEFT read them; kohya, the same as kohya's scripts name them",
    )  # fmt: skip
    parser.add_argument("--base", default="", help="of a run of adapters: folder or workdir where its base is now")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")


def run(args):
    # All of a model in float32 may be more than an accelerator holds, and a run that trains there has it to itself.
    jax.config.update("jax_platforms", "cpu")
    with progress() as show:
        out = export(
            args.workdir,
            args.out,
            ema=not args.plain,
            dtype=args.dtype,
            autoencoder=args.autoencoder,
            base=args.base,
            form=args.form,
            overwrite=args.overwrite,
            on_progress=show,
        )
    if args.form != "merged":
        print(f"Exported the adapters to {out}. Next: its README.md shows how to use them in PyTorch.")
        return
    has_backbone = (out / "transformer").is_dir()
    models = shlex.quote(str(out))
    sampling = f'lwd sample --models {models} --prompt "..." --out samples'
    then = sampling if has_backbone else f"lwd encode --models {models} ..."
    print(f"Exported to {out}: its README.md shows how to use it in PyTorch. Next: {then}")
