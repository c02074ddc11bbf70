"""What a run shows of itself while it trains: pictures in `workdir/previews/` with fixed seeds, and held-out figures.

Stage 1: reconstructions of held-out pictures, at full size and from the pooled latent, and the latent spectrum. Stage
2: samples from the same noise each time, the loss on held-out pictures; once, their saliency and what is supervised
over time. The training loop calls `previews(step, params)` on every process; process 0 writes.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh, NamedSharding

from lwd_jax.autoencoders import kl
from lwd_jax.config import Config, Matching
from lwd_jax.data.batches import held_out, held_out_captions
from lwd_jax.data.latents import open_latents
from lwd_jax.data.pictures import from_uint8
from lwd_jax.data.text import open_text_encoder
from lwd_jax.errors import UserError
from lwd_jax.evaluate.fidelity import psnr, ssim
from lwd_jax.evaluate.spectrum import Spectrum, block_mean, high_frequency_share, latent_spectrum, rgb_reference
from lwd_jax.nn.conditioning import Conditioning, told
from lwd_jax.objective.matching import mask_of, matching_loss, saliency_of
from lwd_jax.objective.paths import noised
from lwd_jax.objective.reconstruction import pool
from lwd_jax.parallel.mesh import batch_parts
from lwd_jax.parallel.rules import place_batch, replicated
from lwd_jax.report import figures
from lwd_jax.report.pipeline import open_models
from lwd_jax.sample.generate import groups, initial_noise, make_decoder, make_sampler, to_uint8
from lwd_jax.sample.schedule import noise_levels
from lwd_jax.train.setup import Setup

FOLDER = "previews"
MASKS = "saliency_and_mask.png"
SHOWN = 4  # pictures in a preview
TIMES = (0.35, 0.5, 0.7, 0.9)  # of the masks that are shown
HELD_OUT_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the held-out loss
BLOCK = 8  # of the spectrum; smaller where the latents are

Previews = Callable[[int, Any], dict]


def _write(workdir: Path, name: str, png: bytes) -> None:
    if jax.process_index() == 0:
        (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        (workdir / FOLDER / name).write_bytes(png)


def short(caption: str, limit: int = 40) -> str:
    """A caption that fits under a picture."""
    return caption if len(caption) <= limit else f"{caption[: limit - 1].rstrip()}…"


# ------------------------------------------------------------------------------------------------------- stage 1


@functools.lru_cache(maxsize=8)
def make_reconstruct(module, scales: tuple[int, ...], out_shardings=None) -> Callable:
    """`f(params, pictures uint8 [B H W 3])`, one picture at a time, on the host, of what an autoencoder makes of
    pictures: `picture` uint8 [B H W 3], D(mean); `mean` [B h w C], in use; `pooled`, s -> uint8 [B H/s W/s 3],
    D(pool_s(mean)).

    Args:
      module: the autoencoder.
      scales: the s.
      out_shardings: where results go; None = where the compiler leaves them.
    """

    def one(params, pictures):
        x = from_uint8(pictures)
        mean = module.apply({"params": params}, x, method="encode").mean

        def decode(z):
            return to_uint8(module.apply({"params": params}, z, method="decode"))

        pooled = {scale: decode(pool(mean, scale)) for scale in scales}
        return {"picture": decode(mean), "mean": kl.scale(module.config, mean), "pooled": pooled}

    jitted = jax.jit(one, out_shardings=out_shardings)

    def reconstruct(params, pictures: np.ndarray) -> dict:
        parts = [jax.device_get(jitted(params, pictures[i : i + 1])) for i in range(len(pictures))]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    return reconstruct


@functools.lru_cache(maxsize=8)
def make_encode(module) -> Callable:
    """`f(params, pictures uint8 [B H W 3]) -> mean [B h w C]`, in use, on the host, one picture at a time."""

    @jax.jit
    def one(params, pictures):
        x = from_uint8(pictures)
        return kl.scale(module.config, module.apply({"params": params}, x, method="encode").mean)

    def encode(params, pictures: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(one(params, pictures[i : i + 1])) for i in range(len(pictures))])

    return encode


def scale_error(pictures: np.ndarray, pooled: dict[int, np.ndarray]) -> dict[int, float]:
    """Mean squared error of D(pool_s(z)) against pool_s(x), as of pictures in [-1, 1], for each s.

    Args:
      pictures: uint8 [B H W 3].
      pooled: s -> uint8 [B H/s W/s 3].
    """
    return {
        scale: float(np.mean(((block_mean(pictures, scale) - decoded) / 127.5) ** 2))
        for scale, decoded in pooled.items()
    }


def spectra(pictures: np.ndarray, latents: dict[str, np.ndarray], factor: int) -> dict[str, Spectrum]:
    """Name -> spectrum, of sets of latents [B h w C] in use and of the pictures, uint8 [B H W 3], pooled by
    `factor`.
    """
    block = min(BLOCK, *(side for z in latents.values() for side in z.shape[1:3]))
    x = from_uint8(pictures)
    reference = {f"RGB pooled by {factor}": rgb_reference(x, factor, block)}
    return reference | {name: latent_spectrum(z, block) for name, z in latents.items()}


def stage1_previews(config: Config, setup: Setup, workdir: Path) -> Previews:
    """Pictures of reconstructions and spectrum; PSNR, SSIM, scale error and high-frequency share of all held-out
    pictures.
    """
    pictures = held_out(config)["picture"]
    scales, factor = config.reconstruction.scales, setup.opened.module.config.factor
    reconstruct = make_reconstruct(setup.opened.module, scales, replicated(setup.mesh))

    def previews(step: int, params: Any) -> dict:
        made = reconstruct(params, pictures)
        fidelity, similarity = psnr(pictures, made["picture"]), ssim(pictures, made["picture"])
        rows = {"photograph": pictures[:SHOWN], "D(E(x))": made["picture"][:SHOWN]}
        rows |= {f"D(E(x) pooled by {scale})": made["pooled"][scale][:SHOWN] for scale in scales}
        blank = [""] * len(rows["photograph"])
        notes = [blank, [f"{p:.1f} dB, SSIM {s:.2f}" for p, s in zip(fidelity[:SHOWN], similarity)]]
        notes += [blank] * len(scales)
        title = f"Held-out photographs and their reconstructions at step {step}"
        _write(workdir, f"step_{step:06d}_reconstructions.png", figures.picture_rows(rows, title, notes))
        drawn = spectra(pictures, {"latent": made["mean"]}, factor)
        png = figures.latent_spectrum(drawn, f"Latent spectrum at step {step}")
        _write(workdir, f"step_{step:06d}_spectrum.png", png)
        errors = scale_error(pictures, made["pooled"])
        return {
            "psnr": fidelity.mean(),
            "ssim": similarity.mean(),
            "latent_high_frequency_share": high_frequency_share(made["mean"]).mean(),
            **{f"scale_error_{scale}": error for scale, error in errors.items()},
        }

    return previews


# ------------------------------------------------------------------------------------------------------- stage 2


def _encode_prompts(config: Config, setup: Setup) -> Conditioning:
    """States [N ..] of the config's prompts, by the text encoder that the latents' captions were encoded with.

    The run's workdir may hold nothing yet: what it is about to say of itself is in the setup.
    """
    text, base = json.loads(setup.description)["text"], config.models.backbone
    folder = open_models(base).text_folder() if base else None
    if folder is None and text["kind"] != "hashed_words":
        raise UserError(
            f"training.preview_prompts needs the text encoders ({text['kind']}) of the latents' captions, but "
            f"models.backbone '{base}' comes with none; leave it empty to preview held-out captions."
        )
    encoder = open_text_encoder(text, folder)
    if encoder.fingerprint != text["fingerprint"]:
        raise UserError(
            f"training.preview_prompts: the latents' captions were encoded by the text encoder "
            f"{text['fingerprint'][:16]}, but that of '{base}' is {encoder.fingerprint[:16]}."
        )
    return Conditioning(*encoder.encode(list(config.training.preview_prompts)))


def _conditioning(
    config: Config, setup: Setup, batch: dict
) -> tuple[Conditioning, Conditioning | None, tuple[str, ...]]:
    """(cond [N ..], null [1 ..] or None, captions [N]) of what is sampled: the config's prompts, or held-out
    captions.
    """
    null = None
    if config.sampling.guidance > 1:
        null = Conditioning(*(part[None] for part in open_latents(config.data.latents).null_text))
    if config.training.preview_prompts:
        return _encode_prompts(config, setup), null, config.training.preview_prompts
    cond = Conditioning(*(batch[name][:SHOWN] for name in ("tokens", "token_mask", "pooled")))
    return cond, null, tuple(held_out_captions(config)[:SHOWN])


@functools.lru_cache(maxsize=8)
def _first(count: int, everywhere: NamedSharding) -> Callable:
    """Moves the first rows of an array, and no others, to every device, so that every process can read them."""
    return jax.jit(lambda x: x[:count], out_shardings=everywhere)


def make_sample(config: Config, module, mesh: Mesh) -> Callable:
    """`f(params, noise [B h w C], cond, null) -> z0` on the host, with the config's sampling settings, one picture at
    a time on every place along `data` and `fsdp`.
    """
    sampling, sampler = config.sampling, make_sampler(module, config.sampling.solver)

    def sample(params, noise, cond, null) -> np.ndarray:
        levels = noise_levels(sampling, module.config, *noise.shape[1:3])
        cond, null = (each and told(each, module.config, sampling.embedded_guidance) for each in (cond, null))
        null, made = place_batch(null, mesh, np.zeros(batch_parts(mesh), int)), []
        for rows, new in groups(len(noise), batch_parts(mesh)):
            z0 = sampler(params, *place_batch((noise, cond), mesh, rows), null, sampling.guidance, levels)
            made.append(jax.device_get(_first(new, replicated(mesh))(z0)))
        return np.concatenate(made)

    return sample


@functools.lru_cache(maxsize=8)  # the arms of a comparison differ in the mask only, and share this program
def _example_losses(matching: Matching, module, autoencoder: kl.Config, everywhere: NamedSharding) -> Callable:
    """Jitted `f(params, examples, t [B], numbers [B], seed) -> metrics [B]` of held-out examples, each with the noise
    of its number.
    """

    def losses(params, examples, t, numbers, seed):
        z0 = kl.scale(autoencoder, examples["mean"])
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
        noise = jax.vmap(lambda key: jax.random.normal(key, z0.shape[1:]))(keys)
        cond = Conditioning(examples["tokens"], examples["token_mask"], examples["pooled"])
        velocity = module.apply(
            {"params": params}, noised(z0, noise, t), t, told(cond, module.config, matching.guidance)
        )

        def one(velocity, *example):  # a batch's metrics are means: of one example they are its own
            z0, t, noise = (x[None] for x in example)
            _, metrics = matching_loss(lambda *_: velocity[None], z0, None, t, noise, matching)
            return {name: metrics[name] for name in ("loss", "loss_detail", "loss_smooth")}

        return jax.vmap(one)(velocity, z0, t, noise)

    return jax.jit(losses, out_shardings=everywhere)


def make_held_out_loss(config: Config, module, autoencoder: kl.Config, mesh: Mesh) -> Callable:
    """`f(params, batch) -> {"loss", "loss_detail", "loss_smooth"}`: the unmasked loss of held-out pictures.

    The times are HELD_OUT_TIMES and the noise hangs on the config's seed alone, so that the steps of a run, and runs
    with different masks, can be compared.

    Args:
      config: of the run.
      module: the backbone.
      autoencoder: the config of the one that made the latents.
      mesh: of the run; as many examples at a time as it has places along `data` and `fsdp`.
    """
    plain = dataclasses.replace(config.matching, mask="everywhere", weighting="none", normalise="all")
    example_losses = _example_losses(plain, module, autoencoder, replicated(mesh))

    def loss(params, batch: dict) -> dict[str, float]:
        examples, found = {name: batch[name] for name in ("mean", "tokens", "token_mask", "pooled")}, []
        for rows, new in groups(len(batch["mean"]) * len(HELD_OUT_TIMES), batch_parts(mesh)):
            pictures, times = np.divmod(rows, len(HELD_OUT_TIMES))
            given = place_batch((np.float32(HELD_OUT_TIMES)[times], rows.astype(np.uint32)), mesh)
            made = example_losses(params, place_batch(examples, mesh, pictures), *given, np.uint32(config.seed))
            found.append({name: values[:new] for name, values in jax.device_get(made).items()})
        return {name: float(np.mean(np.concatenate([each[name] for each in found]))) for name in found[0]}

    return loss


def masks_over_time(z: np.ndarray, matching: Matching, times) -> tuple[np.ndarray, np.ndarray]:
    """Saliency [B h w] of clean latents [B h w C] in use, and masks [B T h w] that a config trains with at the times
    [T]; where its source is noisy, under one fixed noise.
    """
    z0 = jnp.asarray(z)
    noise = jax.random.normal(jax.random.key(0), z0.shape)

    def mask_at(t: float) -> np.ndarray:
        t = jnp.full(len(z0), t)
        return np.asarray(mask_of(z0, noised(z0, noise, t), t, matching))[..., 0]

    return np.asarray(saliency_of(z0, matching))[..., 0], np.stack([mask_at(t) for t in times], axis=1)


def stage2_previews(config: Config, setup: Setup, workdir: Path) -> Previews:
    """Pictures of samples and, once, of masks, SHOWN each where they are of held-out pictures; the loss on all held-out
    pictures, and the samples' high-frequency share.
    """
    decoder, weights = setup.autoencoder
    module, mesh = setup.opened.module, setup.mesh
    batch = held_out(config)
    cond, null, prompts = _conditioning(config, setup, batch)
    noise = np.asarray(initial_noise(config.seed, np.arange(len(prompts)), batch["mean"].shape[1:]))
    sample, decoded = make_sample(config, module, mesh), make_decoder(decoder)
    held_out_loss = make_held_out_loss(config, module, decoder.config, mesh)

    def decode(z: np.ndarray) -> np.ndarray:
        made = []
        for rows, new in groups(len(z), batch_parts(mesh)):
            pictures = decoded(weights, place_batch(z, mesh, rows))
            made.append(jax.device_get(_first(new, replicated(mesh))(pictures)))
        return np.concatenate(made)

    @functools.cache  # once in a process, and by all of them: they decode together
    def show_masks() -> None:
        z = np.asarray(kl.scale(decoder.config, batch["mean"][:SHOWN]))
        pictures = decode(z)
        if (workdir / FOLDER / MASKS).is_file():
            return
        saliency, masks = masks_over_time(z, config.matching, TIMES)
        title = f"What the mask '{config.matching.mask}' supervises at noise level t (decoded held-out latents)"
        _write(workdir, MASKS, figures.saliency_and_masks(pictures, saliency, masks, TIMES, title))

    def previews(step: int, params: Any) -> dict:
        show_masks()
        pictures = decode(sample(params, noise, cond, null))
        notes = [[figures.wrap(prompt, 34) for prompt in prompts]]
        png = figures.picture_rows({"samples": pictures}, f"Samples at step {step}, from fixed noise", notes)
        _write(workdir, f"step_{step:06d}_samples.png", png)
        share = high_frequency_share(pictures).mean()
        return held_out_loss(params, batch) | {"sample_high_frequency_share": share}

    return previews


def make_previews(config: Config, setup: Setup, workdir: Path) -> Previews:
    """The previews of a run, for the loop.

    Args:
      config: of the run.
      setup: `train.setup.Setup` of the same config.
      workdir: pictures go to its folder `previews`.

    Returns:
      (step, parameters for evaluation) -> scalar metrics.

    Raises:
      UserError: no picture is held out; a text encoder for `training.preview_prompts` cannot be opened.
    """
    return {1: stage1_previews, 2: stage2_previews}[config.stage](config, setup, workdir)
