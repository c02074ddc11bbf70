"""Latent Wavelet Diffusion in JAX: fine-tune latent diffusion models to 1K-4K pictures.

The names below are the library's face; everything else is reached through the `lwd` command. They are imported on
first use, so that `wavelet_saliency` and `supervision_mask` can be lifted into other code at the cost of jax alone.
"""

import importlib

_FACE = {
    "Conditioning": "lwd_jax.nn.conditioning",
    "haar": "lwd_jax.objective.wavelets",
    "wavelet_saliency": "lwd_jax.objective.saliency",
    "supervision_mask": "lwd_jax.objective.masks",
    "load_autoencoder": "lwd_jax.autoencoders",
    "save_autoencoder": "lwd_jax.autoencoders",
    "load_backbone": "lwd_jax.backbones",
    "save_backbone": "lwd_jax.backbones",
}
__all__ = list(_FACE)


def __getattr__(name: str):
    if name not in _FACE:
        raise AttributeError(f"module 'lwd_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__():
    return sorted(__all__)
