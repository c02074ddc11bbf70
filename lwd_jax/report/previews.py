"""What a run shows of itself while it trains: pictures in workdir/previews and scalar metrics, with fixed seeds.

Stage 1: reconstructions of held-out pictures, at full size and from the pooled latent, and the latent spectrum. Stage 2:
samples from the same noise each time; once, the saliency of held-out pictures and what is supervised over time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lwd_jax.autoencoders.kl import scale
from lwd_jax.config import Config
from lwd_jax.data.batches import held_out, held_out_captions
from lwd_jax.data.latents import open_latents
from lwd_jax.data.text import open_text_encoder
from lwd_jax.errors import UserError
from lwd_jax.evaluate.fidelity import psnr, ssim
from lwd_jax.evaluate.spectrum import block_mean, high_frequency_share, latent_spectrum, rgb_reference
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.objective.masks import supervision_mask
from lwd_jax.objective.reconstruction import pool
from lwd_jax.objective.saliency import SALIENCIES
from lwd_jax.report import figures
from lwd_jax.sample.generate import decode_in_chunks, initial_noise, make_decoder, make_sampler, to_uint8
from lwd_jax.sample.schedule import sigmas

SHOWN = 4  # pictures per preview
TIMES = (0.35, 0.5, 0.7, 0.9)  # at which the mask is shown
FOLDER = "previews"


def _on_host(tree: Any) -> Any:
    """Whole numpy arrays, on every host."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def _write(workdir: Path, name: str, png: bytes) -> None:
    if jax.process_index() == 0:
        (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        (workdir / FOLDER / name).write_bytes(png)


def autoencoder_previews(config: Config, module, workdir: Path) -> Callable[[int, Any], dict]:
    """Stage 1. See `make_previews`."""
    pictures = held_out(config)["picture"][:SHOWN]
    pooling = max(config.reconstruction.scales)
    factor = module.config.factor

    @jax.jit
    def reconstruct(params, picture):
        x = picture.astype(jnp.float32) / 127.5 - 1
        z = module.apply({"params": params}, x, method="encode").mean
        whole = module.apply({"params": params}, z, method="decode")
        return z, to_uint8(whole), to_uint8(module.apply({"params": params}, pool(z, pooling), method="decode"))

    smaller = np.round(block_mean(pictures.astype(np.float32), pooling)).astype(np.uint8)

    def previews(step: int, params: Any) -> dict:
        parts = [_on_host(reconstruct(params, picture[None])) for picture in pictures]
        z, whole, pooled = (np.concatenate(part) for part in zip(*parts, strict=True))
        quality, likeness, consistency = psnr(pictures, whole), ssim(pictures, whole), psnr(smaller, pooled)
        rows = {
            "photograph": pictures,
            "D(E(x))": whole,
            f"x pooled by {pooling}": smaller,
            f"D(E(x) pooled by {pooling})": pooled,
        }
        blank = [""] * len(pictures)
        notes = [blank, [f"{value:.1f} dB" for value in quality], blank, [f"{value:.1f} dB" for value in consistency]]
        title = f"Held-out photographs and their reconstructions, step {step}"
        _write(workdir, f"step_{step:06d}_reconstructions.png", figures.picture_rows(rows, title, notes))
        spectra = {"latent": latent_spectrum(z), f"RGB pooled by {factor}": rgb_reference(pictures, factor)}
        _write(workdir, f"step_{step:06d}_spectrum.png", figures.latent_spectrum(spectra, f"Latent spectrum, step {step}"))
        return {
            "psnr": quality.mean(),
            "ssim": likeness.mean(),
            "psnr_pooled": consistency.mean(),
            "latent_high_frequency_share": high_frequency_share(z).mean(),
        }

    return previews


def _conditioning(config: Config, batch: dict) -> tuple[Conditioning, Conditioning | None, list[str]]:
    """(cond, null cond, captions) of the samples: config.training.preview_prompts, or the held-out captions."""
    latents, prompts = open_latents(config.data.latents), list(config.training.preview_prompts)
    if prompts:
        text = latents.metadata["text"]
        encoder = open_text_encoder(text, Path(config.models.backbone) if config.models.backbone else None)
        if encoder.fingerprint != text["fingerprint"]:
            raise UserError(
                "training.preview_prompts cannot be encoded: the text encoders in models.backbone are not those of the latents."
            )
        cond = Conditioning(*encoder.encode(prompts))
    else:
        prompts = held_out_captions(config)[: len(batch["tokens"])]
        cond = Conditioning(batch["tokens"], batch["token_mask"], batch["pooled"])
    null = None
    if config.sampling.guidance > 1:
        null = Conditioning(*(np.repeat(part[None], len(prompts), axis=0) for part in latents.null_text))
    return cond, null, prompts


def _show_masks(config: Config, z0: np.ndarray, pictures: np.ndarray, workdir: Path) -> None:
    """Saliency and mask of held-out pictures; they do not depend on the backbone, so once is enough."""
    matching = config.matching
    saliency = SALIENCIES[matching.saliency](z0, matching.wavelet, matching.levels)
    masks = [
        supervision_mask(saliency, jnp.full(len(z0), t), matching.floor, matching.mask, matching.softness) for t in TIMES
    ]
    png = figures.saliency_and_masks(
        list(pictures),
        [np.asarray(map_[..., 0]) for map_ in saliency],
        [np.stack([np.asarray(mask[i, ..., 0]) for mask in masks]) for i in range(len(z0))],
        TIMES,
        f"What the mask '{matching.mask}' (floor {matching.floor:g}) supervises at noise level t",
    )
    _write(workdir, "saliency_and_mask.png", png)


def backbone_previews(config: Config, module, autoencoder: tuple, workdir: Path) -> Callable[[int, Any], dict]:
    """Stage 2. See `make_previews`."""
    batch = {name: part[:SHOWN] for name, part in held_out(config).items()}
    cond, null, prompts = _conditioning(config, batch)
    decoder, weights = autoencoder
    decode, sampler = make_decoder(decoder), make_sampler(module, config.sampling.solver)
    z0 = np.asarray(scale(decoder.config, batch["mean"]))
    noise = initial_noise(config.seed, np.arange(len(prompts)), z0.shape[1:])
    levels = sigmas(config.sampling.steps, config.sampling.shift)

    def previews(step: int, params: Any) -> dict:
        if not (workdir / FOLDER / "saliency_and_mask.png").is_file():
            _show_masks(config, z0, decode_in_chunks(decode, weights, z0), workdir)
        sampled = _on_host(sampler(params, noise, cond, null, config.sampling.guidance, levels))
        pictures = decode_in_chunks(decode, weights, sampled)
        notes = [[prompt if len(prompt) <= 40 else f"{prompt[:37]}..." for prompt in prompts]]
        png = figures.picture_rows({"samples": pictures}, f"Samples, step {step}", notes)
        _write(workdir, f"step_{step:06d}_samples.png", png)
        return {
            "sample_high_frequency_share": high_frequency_share(pictures).mean(),
            "latent_high_frequency_share": high_frequency_share(sampled).mean(),
            "sample_latent_std": sampled.std(),
        }

    return previews


def make_previews(config: Config, setup, workdir: Path) -> Callable[[int, Any], dict]:
    """The previews of a run, for the loop.

    Args:
      config: of the run.
      setup: `train.setup.Setup` of the same config: the module that is trained and, in stage 2, the autoencoder.
      workdir: pictures go to its folder `previews`.

    Returns:
      (step, parameters for evaluation) -> scalar metrics.

    Raises:
      UserError: no picture is held out; preview_prompts that cannot be encoded.
    """
    if config.stage == 1:
        return autoencoder_previews(config, setup.opened.module, workdir)
    return backbone_previews(config, setup.opened.module, setup.autoencoder, workdir)
