"""How energy falls with frequency: the latent spectrum, its RGB reference, and the share of high frequencies.

The spectrum follows "Improving the Diffusability of Autoencoders" (arXiv 2502.14831): a latent whose high
frequencies stand far above those of the picture is hard to diffuse and unstable under a change of scale.
"""

from typing import NamedTuple

import numpy as np


class Spectrum(NamedTuple):
    """Both fields have one entry per zig-zag frequency, [block * block], and are log10 of amplitude over DC."""

    mean: np.ndarray  # over channels
    std: np.ndarray  # over channels


def _dct(x: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    """The orthonormal DCT-II of x along two axes, in float64."""
    from scipy import fft  # half a second, and a command that shows no spectrum needs none

    return fft.dctn(np.asarray(x, np.float64), axes=axes, norm="ortho")


def zigzag(block: int) -> np.ndarray:
    """[block * block] flat indices of a block in JPEG's zig-zag order: diagonals, alternating direction."""
    row, column = np.divmod(np.arange(block * block), block)
    diagonal = row + column
    along = np.where(diagonal % 2 == 0, column, row)
    return np.lexsort((along, diagonal))


def latent_spectrum(z: np.ndarray, block: int = 8) -> Spectrum:
    """The blockwise DCT spectrum of latents (or pooled pictures).

    Orthonormal DCT-II of non-overlapping blocks; mean |coefficient| over images and blocks per channel, divided by that
    of DC, in zig-zag order; then log10, and mean and standard deviation over channels.

    Args:
      z: [B h w C]; rows and columns beyond a multiple of `block` are left out.
      block: side of a block.

    Raises:
      ValueError: z is smaller than one block.
    """
    z = np.asarray(z)
    batch, height, width, channels = z.shape
    rows, columns = height // block, width // block
    if not rows or not columns:
        raise ValueError(
            f"A spectrum in blocks of {block} needs at least {block}x{block} positions, not {height}x{width}."
        )
    blocks = z[:, : rows * block, : columns * block].reshape(batch, rows, block, columns, block, channels)
    amplitude = np.abs(_dct(blocks, (2, 4))).mean(axis=(0, 1, 3))
    amplitude = amplitude.reshape(block * block, channels)[zigzag(block)]
    tiny = np.finfo(np.float64).tiny  # an exactly constant channel has no frequencies to take the logarithm of
    log = np.log10(np.maximum(amplitude, tiny)) - np.log10(np.maximum(amplitude[:1], tiny))
    return Spectrum(log.mean(axis=1), log.std(axis=1))


def block_mean(x: np.ndarray, factor: int) -> np.ndarray:
    """[B H W C] -> [B H/factor W/factor C] means of factor x factor blocks; rows and columns left over are dropped."""
    batch, height, width, channels = x.shape
    rows, columns = height // factor, width // factor
    x = np.asarray(x)[:, : rows * factor, : columns * factor]
    return x.reshape(batch, rows, factor, columns, factor, channels).mean(axis=(2, 4), dtype=np.float32)


def rgb_reference(x: np.ndarray, factor: int, block: int = 8) -> Spectrum:
    """The spectrum of pictures [B H W 3] pooled by the autoencoder's factor: what a latent is compared with."""
    return latent_spectrum(block_mean(x, factor), block)


def high_frequency_share(x: np.ndarray, cutoff: float = 0.5) -> np.ndarray:
    """[B] share in [0, 1] of the non-constant energy above `cutoff` times the Nyquist frequency.

    Frequencies are radial, from an orthonormal DCT-II of the whole image (no wrap-around at its edges), energy summed
    over channels. 0 for a constant image.

    Args:
      x: [B H W C].
      cutoff: in (0, 1).
    """
    energy = (_dct(x, (1, 2)) ** 2).sum(axis=-1)
    energy[:, 0, 0] = 0.0
    height, width = energy.shape[1:]
    radius = np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None] / width)
    total = energy.sum(axis=(1, 2))
    return energy[:, radius >= cutoff].sum(axis=1) / np.where(total > 0, total, 1.0)
