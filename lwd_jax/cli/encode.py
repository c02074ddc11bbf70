"""Makes the latents and text states that stage 2 trains on, of a dataset.

Each picture is scaled to its aspect bucket, cropped at its centre and encoded; mean and standard deviation are kept,
unscaled. Entries are keyed by content and by the weights that made them: run the command again after a kill or a change
of the dataset, and only what is missing is computed.
"""

import argparse
import dataclasses
import math
import shlex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lwd_jax.cli.mesh_flag import open_mesh
from lwd_jax.cli.models_flag import open_given
from lwd_jax.cli.progress import progress
from lwd_jax.data import buckets
from lwd_jax.data.dataset import open_dataset
from lwd_jax.data.latents import Encoder, Plan, encode_dataset, make_posterior
from lwd_jax.data.records import STORAGE
from lwd_jax.data.text import TEXT_ENCODERS, kind_of, open_text_encoder
from lwd_jax.errors import UserError
from lwd_jax.files import locate
from lwd_jax.parallel.mesh import over
from lwd_jax.parallel.rules import place_batch, replicated
from lwd_jax.weights.folder import fingerprint

EXAMPLE = (
    "lwd encode --dataset data/photographs --models runs/stage1 --text sd3 --text-models sd3-medium --out data/latents"
)

_ENCODERS = {"text_length": ("max_length",), "text_dtype": ("dtype",)}
# Text encoder -> flag -> the settings of the encoder that it gives.
_TEXT_FLAGS = {
    "hashed_words": {"text_length": ("length",), "text_width": ("width", "pooled")},
    "sd3": _ENCODERS,
    "flux": _ENCODERS,
}


def arguments(parser) -> None:
    parser.add_argument("--dataset", required=True, help="folder made by lwd prepare")
    parser.add_argument(
        "--models", required=True, help="diffusers folder, or workdir of a stage-1 run: the autoencoder"
    )
    parser.add_argument(
        "--plain", action="store_true", help="of a stage-1 run, the last weights: for runs with models.ema=False"
    )
    parser.add_argument("--out", required=True, help="folder of latents to write or to bring up to date")
    parser.add_argument("--resolution", type=int, default=1024, help="px; as in the config of stage 2")
    parser.add_argument(
        "--buckets",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep aspect ratios, or take centre squares",
    )
    parser.add_argument(
        "--smallest-bucket", type=int, default=Plan.smallest_bucket, help="buckets of fewer pictures join a neighbour"
    )
    parser.add_argument(
        "--text", choices=tuple(TEXT_ENCODERS), help="text encoders; default those of the folder, if there is one"
    )
    parser.add_argument("--text-models", help="diffusers pipeline folder with the text encoders; default --models")
    parser.add_argument(
        "--text-length", type=int, help="tokens of T5 (default: sd3 256, flux 512) or of hashed_words (32)"
    )
    parser.add_argument("--text-width", type=int, help="width of hashed_words: tokens and pooled vector (default 128)")
    parser.add_argument("--text-dtype", choices=("float32", "bfloat16", "float16"), help="of the text encoders")
    parser.add_argument("--captions", type=int, default=Plan.captions, help="caption alternatives kept of each picture")
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size, help="pictures encoded at a time")
    parser.add_argument(
        "--storage", choices=tuple(STORAGE), default=Plan.storage, help="of latents and text states on disk"
    )
    parser.add_argument(
        "--mesh",
        help="devices: data,fsdp,context,tensor; 1,1,8,1 spreads every picture over 8 (default: pictures over all)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the autoencoder's arithmetic"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace latents in --out that were made with another resolution, autoencoder, text encoder or storage",
    )


def _mesh(args) -> Mesh:
    """Of --mesh; without it, of as many devices as divide the batch."""
    spread = math.gcd(args.batch_size, jax.local_device_count())
    return open_mesh(args.mesh or f"{spread},1,1,1", args.batch_size)


def _text_settings(args, kind: str) -> dict:
    settings = {}
    for flag in ("text_length", "text_width", "text_dtype"):
        value, fields = getattr(args, flag), _TEXT_FLAGS[kind].get(flag)
        if value is None:
            continue
        if fields is None:
            raise UserError(f"--{flag.replace('_', '-')} says nothing to the text encoder {kind}.")
        settings |= dict.fromkeys(fields, value)
    return settings


def make_encoder(module, params, mesh: Mesh) -> Encoder:
    """The autoencoder as `encode_dataset` takes it.

    Args:
      module, params: of the autoencoder; the module's `config` has scaling, shift and latent_channels.
      mesh: pictures lie over data and fsdp, their heights (or widths) over context.
    """
    placed = jax.device_put(params, replicated(mesh))
    posterior = over(mesh, make_posterior(module))

    def encode(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(map(np.asarray, posterior(placed, place_batch(pictures, mesh))))

    config = {**dataclasses.asdict(module.config), "scaling": module.config.scaling, "shift": module.config.shift}
    return Encoder(fingerprint(params), config, encode, jnp.dtype(module.dtype).name)


def _autoencoder_words(args) -> list[str]:
    """How a config names the weights that made the latents."""
    return [f"--config.models.autoencoder={args.models}", *(["--config.models.ema=False"] if args.plain else [])]


def run(args) -> None:
    buckets.check_resolution(args.resolution, args.buckets)
    mesh = _mesh(args)
    dataset = open_dataset(args.dataset)
    models = open_given(args.models, plain=args.plain)
    if args.plain and models.config.stage == 2:
        raise UserError(
            f"--plain takes the last weights of a stage-1 run, but '{args.models}' is of stage 2, whose config says "
            f"which weights its autoencoder has (models.ema {models.config.models.ema})."
        )
    text_folder = locate(args.text_models) if args.text_models else models.text_folder()
    if not args.text and not text_folder:
        raise UserError(
            f"'{args.models}' has no text encoders: name a folder with --text-models, or add --text hashed_words."
        )
    kind = args.text or kind_of(text_folder)
    text = open_text_encoder({"kind": kind, "settings": _text_settings(args, kind)}, text_folder)
    print(f"Text: {text.notice}")
    module, params = models.autoencoder(dtype=jnp.dtype(args.dtype))
    encoder = make_encoder(module, params, mesh)
    plan = Plan(
        resolution=args.resolution,
        keep_aspect=args.buckets,
        smallest_bucket=args.smallest_bucket,
        batch_size=args.batch_size,
        captions=args.captions,
        storage=args.storage,
    )
    with progress() as show:
        outcome = encode_dataset(dataset, args.out, encoder, text, plan, show, args.overwrite)
    for name, reason in outcome.rejects:
        print(f"Left out: {name}: {reason}")
    print(f"Pictures: {outcome.pictures_made} encoded, {outcome.pictures_kept} kept from before.")
    print(f"Captions: {outcome.texts_made} encoded, {outcome.texts_kept} kept from before.")
    print(
        f"Latents of the autoencoder {encoder.fingerprint[:16]} are in {args.out}. Next: lwd train --config=FILE "
        f"--workdir=D {shlex.join([f'--config.data.latents={args.out}', *_autoencoder_words(args)])}"
    )
