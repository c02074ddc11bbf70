"""Shows what Latent Wavelet Diffusion sees in pictures: saliency, supervised positions over the noise level t, spectra.

With --models a picture is looked at in the latent space of that autoencoder, the mean of its posterior. Without, its
own colours, averaged over blocks of 8 x 8 px, stand in for a latent: good for a first look at a set of pictures, but
the latents of an autoencoder have other details.

--out gets, for each picture: NAME_saliency.png (one pixel per position of the latent), NAME_masks.png and
NAME_spectrum.png; for all of them: supervised.png (supervised share over t) and inspect.json (the numbers).
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from PIL import Image

from lwd_jax.autoencoders.kl import scale
from lwd_jax.cli.models_flag import open_given
from lwd_jax.cli.progress import progress
from lwd_jax.config import Matching, check_seed
from lwd_jax.data.pictures import Rejected, decode, from_uint8, standardise
from lwd_jax.errors import UserError
from lwd_jax.evaluate.spectrum import block_mean, high_frequency_share, latent_spectrum, rgb_reference
from lwd_jax.files import locate
from lwd_jax.objective.masks import MASKS, supervision_mask
from lwd_jax.objective.paths import noised
from lwd_jax.objective.saliency import wavelet_saliency
from lwd_jax.report import figures
from lwd_jax.report.photographs import unique
from lwd_jax.report.staging import check_free, staged
from lwd_jax.report.style import HEAT

EXAMPLE = "lwd inspect photographs/mountain.jpg --models stable-diffusion-3-medium --out inspection"
RESULT = "inspect.json"
DIVISOR = 16  # px: 8 of the autoencoder times 2, so that the Haar transform meets no border of its own
SMALLEST = 64  # px: one 8 x 8 block of a spectrum
STAND_IN_FACTOR = 8
CURVE = np.linspace(0, 1, 101)
SHOWN = 900  # px, of the long side of a picture in NAME_masks.png


def arguments(parser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--out", required=True, help="folder to write: new, or empty")
    parser.add_argument("--models", help="diffusers folder or workdir: the autoencoder; default: the colours")
    parser.add_argument("--autoencoder", default="", help="folder or workdir to take the autoencoder from instead")
    parser.add_argument("--wavelet", default=Matching.wavelet, help="a PyWavelets name (default %(default)s)")
    parser.add_argument("--levels", type=int, default=Matching.levels, help="wavelet levels (default %(default)s)")
    parser.add_argument("--floor", type=float, default=Matching.floor, help="of the mask (default %(default)s)")
    parser.add_argument("--mask", choices=tuple(MASKS), default=Matching.mask, help="rule (default %(default)s)")
    parser.add_argument("--softness", type=float, default=Matching.softness, help="of soft (default %(default)s)")
    parser.add_argument(
        "--source",
        choices=("clean", "noisy"),
        default=Matching.source,
        help="map of z0 or of z_t (default %(default)s)",
    )
    parser.add_argument(
        "--times", type=float, nargs="+", default=[0.35, 0.5, 0.7, 0.9], help="noise levels of the masks that are drawn"
    )
    parser.add_argument("--long-side", type=int, help="px: larger pictures are scaled down to it first")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of --source noisy (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the autoencoder's arithmetic"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier inspection in --out")


# ---------------------------------------------------------------------------------------------------------- input


def _check(args) -> None:
    """What can be refused before anything is read."""
    check_free(args.out, args.overwrite, RESULT, (*args.images, args.models, args.autoencoder))
    for image in args.images:
        if not locate(image).is_file():
            kind = "is a folder; name pictures" if locate(image).is_dir() else "is not there"
            raise UserError(f"The picture '{image}' {kind}.")
    check_seed(args.seed)
    if not 0 < args.floor < 1:
        raise UserError(f"--floor must lie in (0, 1), but it is {args.floor:g}.")
    for t in args.times:
        if not 0 <= t <= 1:
            raise UserError(f"--times are noise levels in [0, 1], but one is {t:g}.")
    if args.long_side is not None and args.long_side < SMALLEST:
        raise UserError(f"--long-side must be at least {SMALLEST} px, but it is {args.long_side}.")
    if args.autoencoder and not args.models:
        raise UserError("--autoencoder replaces the one of --models; name the folder with --models instead.")
    if args.source == "noisy" and not args.models:
        raise UserError("--source noisy needs --models: block means of colours do not have the scale of a latent.")
    if args.mask == "soft" and not 0 < args.softness < float("inf"):
        raise UserError(f"--softness must be positive and finite, but it is {args.softness:g}.")
    # An unknown wavelet is named before a model is read.
    jax.eval_shape(lambda z: wavelet_saliency(z, args.wavelet), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))


def read_picture(path: str, long_side: int | None) -> np.ndarray:
    """[H W 3] uint8 sRGB, upright, cropped at its centre to multiples of DIVISOR px; never enlarged.

    Raises:
      UserError: a file that cannot be read, not a picture, a picture bomb, or too small.
    """
    try:
        standard = standardise(locate(path).read_bytes())
    except Rejected as reason:
        raise UserError(f"'{path}' is not used: {reason}.") from reason
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.") from error
    size = np.array([standard.height, standard.width])
    if long_side:
        size = np.round(size * min(1, long_side / size.max())).astype(int)
    if size.min() < SMALLEST:
        scaled = f", scaled to --long-side {long_side}," if long_side else ""
        raise UserError(f"'{path}' is not used: {size[1]} x {size[0]} px{scaled} is less than {SMALLEST} px.")
    picture = decode(standard.data, tuple(map(int, size)))
    height, width = size // DIVISOR * DIVISOR
    top, left = (size - (height, width)) // 2
    return picture[top : top + height, left : left + width]


class Space(NamedTuple):
    """Where pictures are looked at.

    Attributes:
      name: in a sentence.
      factor: px per position.
      encode: [H W 3] uint8 -> z [1 h w C] float32, as stage 2 sees it.
      description: a JSON object.
    """

    name: str
    factor: int
    encode: Callable[[np.ndarray], np.ndarray]
    description: dict


def open_space(models: str | None, autoencoder: str, dtype: str) -> Space:
    """The latent space of an autoencoder, or its stand-in."""
    if not models:
        block = STAND_IN_FACTOR
        name = f"the picture's own colours, averaged over blocks of {block} x {block} px, in place of a latent"
        return Space(name, block, lambda picture: block_mean(from_uint8(picture[None]), block), {"kind": "colours"})
    opened = open_given(models, autoencoder=autoencoder)
    module, params = opened.autoencoder(dtype=jnp.dtype(dtype))

    @jax.jit
    def latent(params, x):
        return scale(module.config, module.apply({"params": params}, x, method="encode").mean).astype(jnp.float32)

    def encode(picture: np.ndarray) -> np.ndarray:
        return np.asarray(latent(params, from_uint8(picture[None])))

    name = f"latents of the autoencoder in {models}"
    description = {"kind": "latent", "models": opened.describe(), "dtype": dtype}
    return Space(name, module.config.factor, encode, description)


# --------------------------------------------------------------------------------------------------------- looking


class Seen(NamedTuple):
    """What is known of one picture.

    Attributes:
      saliency: [h w] of the clean latent.
      masks: [T h w] at the times that are drawn.
      curve: [len(CURVE)] supervised shares.
      numbers: a JSON object.
    """

    saliency: np.ndarray
    masks: np.ndarray
    curve: np.ndarray
    numbers: dict


def look(z: np.ndarray, args) -> Seen:
    """Saliency, masks and numbers of one latent [1 h w C]."""
    z = jnp.asarray(z)
    noise = jax.random.normal(jax.random.key(args.seed), z.shape)
    saliency = wavelet_saliency(z, args.wavelet, args.levels)

    @jax.jit
    def mask_at(t):
        t = t[None]
        map_ = saliency if args.source == "clean" else wavelet_saliency(noised(z, noise, t), args.wavelet, args.levels)
        return supervision_mask(map_, t, args.floor, args.mask, args.softness)[0, ..., 0]

    masks = np.stack([np.asarray(mask_at(jnp.float32(t))) for t in args.times])
    curve = np.array([np.asarray(mask_at(jnp.float32(t))).mean(dtype=np.float64) for t in CURVE])
    map_ = np.asarray(saliency)[0, ..., 0]
    numbers = {
        "latent": list(z.shape[1:]),
        "supervised": {f"{t:g}": float(mask.mean(dtype=np.float64)) for t, mask in zip(args.times, masks)},
        "supervised_over_uniform_t": float(np.trapezoid(curve, CURVE)),
        "saliency_quantiles": {f"{q:g}": float(np.quantile(map_, q)) for q in (0.5, 0.9, 0.99)},
        "high_frequency_share": float(high_frequency_share(np.asarray(z))[0]),
    }
    return Seen(map_, masks, curve, numbers)


def _heat(saliency: np.ndarray) -> Image.Image:
    from matplotlib import colormaps  # here, as in report.style

    return Image.fromarray((colormaps[HEAT](np.sqrt(saliency))[..., :3] * 255).round().astype(np.uint8))


def _panels(picture: np.ndarray, seen: Seen, args) -> tuple[list[np.ndarray], list[str]]:
    """The photograph, its saliency and its supervised part at each time, and a note for each."""
    image = Image.fromarray(picture)
    image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    small = np.asarray(image)
    heat = np.asarray(_heat(seen.saliency).resize(image.size, Image.Resampling.BOX))
    of_clean = " of the clean latent" if args.source == "noisy" else ""
    notes = [f"{picture.shape[1]} x {picture.shape[0]} px", f"saliency{of_clean} (root scale: 0 dark, 1 bright)"]
    notes += [f"t = {t:g}: {100 * mask.mean():.2g} % supervised" for t, mask in zip(args.times, seen.masks)]
    return [small, heat, *(figures.supervised(small, mask) for mask in seen.masks)], notes


def draw(folder: Path, name: str, picture: np.ndarray, z: np.ndarray, seen: Seen, space: Space, args) -> None:
    """Writes the three pictures of one picture."""
    _heat(seen.saliency).save(folder / f"{name}_saliency.png")
    panels = figures.panels(*_panels(picture, seen, args), f"{name}: what is supervised")
    (folder / f"{name}_masks.png").write_bytes(panels)
    kind = "latent" if args.models else "block means"
    spectra = {kind: latent_spectrum(z)}
    if args.models:
        spectra[f"RGB, pooled by {space.factor}"] = rgb_reference(from_uint8(picture[None]), space.factor)
    (folder / f"{name}_spectrum.png").write_bytes(figures.latent_spectrum(spectra, f"{name}: spectrum"))


def _names(images: list[str]) -> list[str]:
    """The stems of the files, with a number where one comes again."""
    names = []
    for image in images:
        names.append(unique(Path(image).stem, names))
    return names


def _settings(args) -> dict:
    names = ("wavelet", "levels", "floor", "mask", "softness", "source", "seed", "times", "long_side")
    return {name: getattr(args, name) for name in names}


def run(args) -> None:
    _check(args)
    names = _names(args.images)
    space = open_space(args.models, args.autoencoder, args.dtype)
    print(f"Looking at {space.name}.")
    seen_of, entries = {}, []
    with staged(args.out, args.overwrite, RESULT) as folder, progress() as show:
        show("pictures", 0, len(names))
        for done, (name, image) in enumerate(zip(names, args.images), start=1):
            picture = read_picture(image, args.long_side)
            height, width = picture.shape[:2]
            print(f"{image}: {width} x {height} px, {width // space.factor} x {height // space.factor} positions.")
            z = space.encode(picture)
            seen = look(z, args)
            draw(folder, name, picture, z, seen, space, args)
            seen_of[name] = seen.curve
            entries.append({"file": image, "name": name, "width": width, "height": height, **seen.numbers})
            entries[-1]["curve"] = seen.curve.tolist()
            show("pictures", done, len(names))
        (folder / "supervised.png").write_bytes(figures.supervised_fraction(seen_of, CURVE, args.floor))
        result = {"space": space.description, "settings": _settings(args), "curve_times": CURVE.tolist()}
        result["pictures"] = entries
        (folder / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    share = np.mean([entry["supervised_over_uniform_t"] for entry in entries])
    print(f"Over a uniform t, {100 * share:.0f} % of the positions are supervised.")
    following = f"lwd train --config=FILE --workdir=D --config.matching.floor={args.floor:g}"
    if not args.models:
        following = "the same with --models FOLDER, for the latents of your autoencoder"
    print(f"Wrote {3 * len(names) + 1} pictures and {RESULT} to {args.out}. Next: {following}")
