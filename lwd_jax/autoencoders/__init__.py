"""Autoencoders: encode a picture to a Posterior over latents, decode a latent to a picture. One file each."""

import os
from typing import Any

import jax.numpy as jnp

from lwd_jax.autoencoders import kl
from lwd_jax.weights import model

AUTOENCODERS = {"AutoencoderKL": kl.AUTOENCODER}


def load_autoencoder(
    folder: str | os.PathLike, *, dtype=jnp.float32, param_dtype=jnp.float32, remat: str = "none", shardings=None
) -> tuple[kl.AutoencoderKL, Any]:
    """(module, params) of a diffusers folder: the autoencoder's own, or a pipeline's. See `weights.model.load`."""
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return model.load(AUTOENCODERS, folder, subfolder="vae", shardings=shardings, **kinds)


def save_autoencoder(folder: str | os.PathLike, module: kl.AutoencoderKL, params, *, dtype=None) -> None:
    """Writes a folder that `load_autoencoder` and diffusers' AutoencoderKL.from_pretrained read.

    Args:
      dtype: of the file, float32, float16 or bfloat16; None = the parameters' own.
    """
    model.save(AUTOENCODERS[type(module).__name__], folder, module, params, dtype=dtype)
