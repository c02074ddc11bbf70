"""Prompts -> pictures -> a folder of PNG files that say how they were made, with samples.json beside them."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from safetensors.numpy import load

from lwd_jax import config as configs
from lwd_jax.config import Sampling, check_seed
from lwd_jax.data.text import TextEncoder
from lwd_jax.errors import UserError, check_unicode
from lwd_jax.files import locate
from lwd_jax.nn.conditioning import Conditioning, told
from lwd_jax.parallel.mesh import batch_parts, make_mesh, over
from lwd_jax.parallel.rules import param_shardings, place_batch, replicated
from lwd_jax.report.pipeline import FolderModels, WorkdirModels
from lwd_jax.report.progress import Show, ignore
from lwd_jax.sample.generate import groups, initial_noise, make_decoder, make_sampler
from lwd_jax.sample.schedule import noise_levels, sigmas

INDEX = "samples.json"
SIZE_UNIT = 16  # px: 8 of the autoencoder times 2 of a patch


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample.

    Attributes:
      prompts: one picture each; the position is the picture's index, which its noise depends on.
      negative: prompt to steer away from; "" = the empty caption of training.
      width, height: px.
      sampling: solver, steps, both guidances (classifier-free: at most 1 = off), shift.
      seed: of the noise.
      batch: pictures at a time.
      dtype: of matrix products and activations, and of the parameters in memory.
      noise: [N h w C] to start from instead of the seed's; None = by the seed.
    """

    prompts: tuple[str, ...]
    width: int
    height: int
    sampling: Sampling
    negative: str = ""
    seed: int = 0
    batch: int = 1
    dtype: str = "float32"
    noise: np.ndarray | None = None

    def __post_init__(self):
        if not self.prompts:
            raise UserError("There is no prompt.")
        if self.width < SIZE_UNIT or self.height < SIZE_UNIT or self.width % SIZE_UNIT or self.height % SIZE_UNIT:
            size = f"{self.width} x {self.height}"
            raise UserError(f"Pictures must measure multiples of {SIZE_UNIT} px, but {size} was asked for.")
        if self.batch < 1:
            raise UserError(f"At least one picture at a time must be sampled, but the batch is {self.batch}.")
        check_seed(self.seed)
        for name in ("guidance", "embedded_guidance", "shift"):
            if not math.isfinite(getattr(self.sampling, name)):
                raise UserError(f"The {name.replace('_', ' ')} is {getattr(self.sampling, name)}: no finite number.")
        for prompt in (*self.prompts, self.negative):
            check_unicode(prompt, "The prompt")
        sigmas(self.sampling.steps, self.sampling.shift)  # says now what is wrong, before the models are read


class Sample(NamedTuple):
    """One line of samples.json: the file, what it shows, the seed and index of its noise."""

    file: str
    prompt: str
    negative: str
    seed: int | None
    index: int
    width: int
    height: int


def _one_array(loaded) -> np.ndarray:
    """What np.load gave, unless it is an archive of several arrays."""
    if not isinstance(loaded, np.ndarray):
        raise ValueError("it is an archive of arrays, not one array")
    return loaded


def read_noise(path: str) -> np.ndarray:
    """Latents from PyTorch, [N C h w], in a .npy file or alone in a .safetensors file -> [N h w C] float32.

    Raises:
      UserError: no such file, another kind of file, not one tensor with four axes, values that are not finite.
    """
    file = locate(path)
    if not file.is_file():
        raise UserError(f"There is no file '{path}'.")
    if file.suffix not in (".npy", ".safetensors"):
        raise UserError(f"Latents are read from .npy and .safetensors files, but '{path}' is neither.")
    try:
        if file.suffix == ".npy":
            with file.open("rb") as opened:
                tensors = [_one_array(np.load(opened, allow_pickle=False))]
        else:
            tensors = list(load(file.read_bytes()).values())
    except (ValueError, EOFError, OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(tensors) != 1 or tensors[0].ndim != 4:
        raise UserError(f"'{path}' must hold one tensor of latents, [pictures, channels, height, width].")
    noise = np.ascontiguousarray(tensors[0].transpose(0, 2, 3, 1), dtype=np.float32)
    if not np.isfinite(noise).all():
        raise UserError(f"'{path}' holds values that are not finite.")
    return noise


def encode_prompts(encoder: TextEncoder, request: Request) -> tuple[Conditioning, Conditioning]:
    """Text states, on the host: of every prompt [N ..], and of the negative one [1 ..]."""
    captions = list(dict.fromkeys((*request.prompts, request.negative)))
    encoder.tell_of_longer(captions)
    states = encoder.encode(captions)

    def of(wanted):
        rows = [captions.index(caption) for caption in wanted]
        return Conditioning(tokens=states.tokens[rows], mask=states.mask[rows], pooled=states.pooled[rows])

    return of(request.prompts), of([request.negative])


def _noise(request: Request, indices: np.ndarray, shape: tuple[int, int, int]) -> Any:
    return initial_noise(request.seed, indices, shape) if request.noise is None else request.noise[indices]


def _latents(models, request: Request, cond: Conditioning, null: Conditioning, mesh: Mesh, on_progress) -> np.ndarray:
    """z0 of every picture, on the host; the backbone is let go of on return."""
    kind = jnp.dtype(request.dtype)
    layouts = functools.partial(param_shardings, mesh=mesh)
    module, params = models.backbone(dtype=kind, param_dtype=kind, shardings=layouts)
    width, pooled = module.config.joint_attention_dim, module.config.pooled_projection_dim
    if (cond.tokens.shape[-1], cond.pooled.shape[-1]) != (width, pooled):
        raise UserError(
            f"The text states are {cond.tokens.shape[-1]} and pooled {cond.pooled.shape[-1]} wide, but the backbone of "
            f"'{models.path}' reads {width} and {pooled}."
        )
    shape = (
        *(side // module.config.latent_factor for side in (request.height, request.width)),
        module.config.in_channels,
    )
    count = len(request.prompts)
    if request.noise is not None and request.noise.shape != (count, *shape):
        (n, h, w, c), (height, width, channels) = request.noise.shape, shape
        raise UserError(
            f"The latents given are {n} of {c} x {h} x {w}, but {count} of {channels} x {height} x {width} are needed."
        )
    sampler = over(mesh, make_sampler(module, request.sampling.solver))
    levels = noise_levels(request.sampling, module.config, *shape[:2])
    cond, null = (told(each, module.config, request.sampling.embedded_guidance) for each in (cond, null))
    null = null if request.sampling.guidance > 1 else None
    null = place_batch(null, mesh, np.zeros(request.batch, int))
    done = []
    for rows, new in groups(count, request.batch):
        part = place_batch(_noise(request, rows, shape), mesh), place_batch(cond, mesh, rows)
        z0 = sampler(params, *part, null, request.sampling.guidance, levels)
        done.append(np.asarray(z0)[:new])
        on_progress("sampling", rows[0] + new, count)
    return np.concatenate(done)


def sample_pictures(
    models: FolderModels | WorkdirModels,
    request: Request,
    cond: Conditioning,
    null: Conditioning,
    on_progress: Show = ignore,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """The pictures of a request, in order. Backbone and autoencoder are in memory one after the other.

    Args:
      models: of `open_models`.
      request: what to sample.
      cond, null: text states of the N prompts and of the negative one, of `encode_prompts`.
      on_progress: called with ("sampling" or "decoding", done, total).
      mesh: of the devices to use; None = one. The backbone's weights lie over it, the autoencoder's are whole on every
        device; as many pictures are decoded at a time as `data` and `fsdp` are devices.

    Yields:
      uint8 [H W 3].

    Raises:
      UserError: no backbone or autoencoder; text states or latents of another shape; a batch that does not divide over
        the mesh.
    """
    mesh = mesh or make_mesh(configs.Mesh(fsdp=1), jax.local_devices()[:1])
    z0 = _latents(models, request, cond, null, mesh, on_progress)
    kind = jnp.dtype(request.dtype)
    whole = functools.partial(jax.tree.map, lambda _: replicated(mesh))
    module, params = models.autoencoder(dtype=kind, param_dtype=kind, shardings=whole)
    if module.config.latent_channels != z0.shape[-1]:
        channels = module.config.latent_channels
        raise UserError(f"The autoencoder has {channels} latent channels, but the backbone {z0.shape[-1]}.")
    decoder = over(mesh, make_decoder(module))
    for rows, new in groups(len(z0), batch_parts(mesh)):
        pictures = np.asarray(decoder(params, place_batch(z0, mesh, rows)))[:new]
        on_progress("decoding", rows[0] + new, len(z0))
        yield from pictures


def write_samples(folder: Path, pictures: Iterator[np.ndarray], request: Request, origin: dict) -> list[Sample]:
    """Writes PNG files, each with its parameters as text, and samples.json.

    Args:
      folder: an empty folder.
      pictures: of `sample_pictures`.
      request: the same.
      origin: what is known of the models; a JSON object.

    Returns:
      One Sample per picture.
    """
    settings = dataclasses.asdict(request.sampling) | {"dtype": request.dtype}
    seed = request.seed if request.noise is None else None
    samples = []
    for index, (prompt, picture) in enumerate(zip(request.prompts, pictures, strict=True)):
        sample = Sample(f"{index:05d}.png", prompt, request.negative, seed, index, request.width, request.height)
        text = PngInfo()
        text.add_itxt("prompt", prompt)
        text.add_itxt("lwd", json.dumps({**sample._asdict(), **settings, "models": origin}, ensure_ascii=False))
        Image.fromarray(picture).save(folder / sample.file, pnginfo=text)
        samples.append(sample)
    index = {"models": origin, "settings": settings, "samples": [sample._asdict() for sample in samples]}
    (folder / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return samples
