"""Pictures from prompts, with the models of a diffusers folder or of a run's workdir.

Every picture's noise depends on --seed and on its own number alone: jax.random.normal(fold_in(key(seed), number)). To
start from the latents of a PyTorch run instead, save them ([N, C, h, w]) and name the file with --latents.
"""

import dataclasses
import re
import shlex

import jax

from lwd_jax.cli.mesh_flag import open_mesh
from lwd_jax.cli.models_flag import open_given
from lwd_jax.cli.progress import progress
from lwd_jax.errors import UserError, choose, read_text
from lwd_jax.files import locate
from lwd_jax.report.pipeline import text_encoder
from lwd_jax.report.samples import INDEX, Request, encode_prompts, read_noise, sample_pictures, write_samples
from lwd_jax.report.staging import check_free, staged
from lwd_jax.sample.solvers import SOLVERS

EXAMPLE = 'lwd sample --models runs/stage2 --prompt "a red boat on a lake" --out samples --resolution 1536x1024'


def arguments(parser):
    parser.add_argument("--models", required=True, help="diffusers folder, or workdir of a run of stage 2")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt-file", help="text file with one prompt a line")
    parser.add_argument("--negative", default="", help="prompt to steer away from (default: the empty caption)")
    parser.add_argument("--out", required=True, help="folder to write: new, or empty")
    parser.add_argument("--resolution", help="side in px, or WIDTHxHEIGHT (default: what the models were made for)")
    parser.add_argument("--steps", type=int, help="solver steps (default: the run's, or 28)")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance, 1 = off (default: the run's; a folder's: 5, FLUX 1)"
    )
    parser.add_argument("--embedded-guidance", type=float, help="that FLUX.1-dev is told (default: the run's, or 3.5)")
    parser.add_argument(
        "--shift",
        type=float,
        help="of the noise levels at every size (default: the run's, or the scheduler's, which FLUX's makes grow with "
        "the picture: give 3 above 1024 px)",
    )
    parser.add_argument("--solver", help=f"{' or '.join(SOLVERS)} (default: the run's, or euler)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    parser.add_argument("--count", type=int, default=1, help="pictures per prompt (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pictures sampled at a time (default %(default)s)")
    parser.add_argument("--mesh", default="1,1,1,1", help="devices: data,fsdp,context,tensor (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--plain", action="store_true", help="of a workdir, the last weights, not the averaged ones")
    parser.add_argument("--autoencoder", default="", help="folder or workdir to take the autoencoder from instead")
    parser.add_argument("--base", default="", help="of a run of adapters: folder or workdir where its base is now")
    parser.add_argument("--text-models", default="", help="diffusers folder with text encoders, if --models has none")
    parser.add_argument("--latents", help="initial noise, .npy or .safetensors, [N, C, height/8, width/8]")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier samples in --out")


def _prompts(args) -> tuple[str, ...]:
    prompts = list(args.prompt)
    if args.prompt_file:
        if not locate(args.prompt_file).is_file():
            raise UserError(f"There is no file '{args.prompt_file}'.")
        lines = read_text(locate(args.prompt_file)).split("\n")
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("There is nothing to draw: give --prompt or --prompt-file.")
    if args.count < 1:
        raise UserError(f"--count must be at least 1, but it is {args.count}.")
    return tuple(prompt for prompt in prompts for _ in range(args.count))


def _size(text: str) -> tuple[int, int]:
    """(width, height) of "1024" or "1536x1024"."""
    found = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text.lower())
    if not found:
        raise UserError(f"Write --resolution as a side in px or as WIDTHxHEIGHT, not as '{text}'.")
    return int(found[1]), int(found[2] or found[1])


def _request(args, models) -> Request:
    names = ("steps", "guidance", "embedded_guidance", "shift", "solver")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.shift is not None:
        given["shift_rule"] = "static"
    sampling = dataclasses.replace(models.sampling(), **given)
    choose(SOLVERS, sampling.solver, "solver")
    noise = read_noise(args.latents) if args.latents else None
    if args.resolution:
        width, height = _size(args.resolution)
    elif noise is not None:
        height, width = (8 * side for side in noise.shape[1:3])
    else:
        width = height = models.resolution()
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return Request(_prompts(args), width, height, sampling, args.negative, args.seed, args.batch, dtype, noise)


def run(args):
    reads = (args.models, args.autoencoder, args.base, args.text_models, args.prompt_file, args.latents)
    check_free(args.out, args.overwrite, INDEX, reads)
    models = open_given(args.models, plain=args.plain, autoencoder=args.autoencoder, base=args.base)
    request, mesh = _request(args, models), open_mesh(args.mesh, args.batch)
    encoder = text_encoder(models, args.text_models)
    print(f"Text: {encoder.notice}")
    cond, null = encode_prompts(encoder, request)
    del encoder  # it may be larger than the models
    with staged(args.out, args.overwrite, INDEX) as folder, progress() as show:
        samples = write_samples(
            folder, sample_pictures(models, request, cond, null, show, mesh), request, models.describe()
        )
    number = f"{len(samples)} picture{'' if len(samples) == 1 else 's'}"
    first = locate(args.out) / samples[0].file
    print(f"Wrote {number} and {INDEX} to {args.out}. Next: lwd inspect {shlex.quote(str(first))} --out inspection")
