"""Saliency: where a latent has detail, as a map in [0, 1] (A in Latent Wavelet Diffusion, arXiv 2506.00433)."""

from functools import partial

import jax

from lwd_jax.objective.wavelets import detail_energy, resize_bilinear
from lwd_jax.shapes import Array, shaped

EPS = 1e-8  # keeps the map of a latent without detail at 0


@partial(jax.jit, static_argnames=("wavelet", "levels"), inline=True)
@shaped("z: B h w C -> B h w 1")
def wavelet_saliency(z: Array, wavelet: str = "haar", levels: int = 1) -> Array:
    """Normalised wavelet detail energy of a latent: A in arXiv 2506.00433, section "wavelet-based saliency".

    `detail_energy`, brought up to h x w bilinearly (half-pixel centres, edges clamped; torch's
    interpolate(mode="bilinear", align_corners=False)), then per sample (E - min) / (max - min + 1e-8). Every channel
    counts. The map does not change with the latent's sign, nor with its scale as long as max - min of the energy is
    far above 1e-8; it is 0 on a constant latent.

    Args:
      z: [B h w C], any real dtype; computed in float32.
      wavelet: a discrete wavelet of PyWavelets; "haar" needs jax alone.
      levels: how many levels' energies are averaged.

    Returns:
      [B h w 1] float32 in [0, 1].

    Raises:
      UserError: an unknown wavelet, or levels that the latent is too small for.
    """
    energy = resize_bilinear(detail_energy(z, wavelet, levels), z.shape[1:3])
    low = energy.min(axis=(1, 2), keepdims=True)
    high = energy.max(axis=(1, 2), keepdims=True)
    return (energy - low) / (high - low + EPS)


def released_three_channels(z: Array, wavelet: str = "haar", levels: int = 1) -> Array:
    """The map that the released PyTorch code trains with, for comparison only: `wavelet_saliency` of channels 0-2.

    That code indexes the channel axis of its transform's output as if it were the sub-band axis, so that thirteen of
    sixteen channels never reach the map.
    """
    return wavelet_saliency(z[..., :3], wavelet, levels)


SALIENCIES = {"wavelet": wavelet_saliency, "released_three_channels": released_three_channels}
