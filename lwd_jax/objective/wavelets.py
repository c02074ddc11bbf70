"""Orthonormal wavelets of latents, and the energy of their details.

The single-level Haar transform is four strided views and needs jax alone; jaxwt is imported only for other wavelets.
All of it is float32, whatever comes in (a float32 island of the project).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwd_jax.errors import UserError, did_you_mean
from lwd_jax.shapes import Array, shaped

HAAR_NAMES = ("haar", "db1")


class Subbands(NamedTuple):
    """One level of a separable transform, each [B ceil(h/2) ceil(w/2) C].

    PyWavelets and jaxwt call lh "horizontal", hl "vertical" and hh "diagonal" details: lh differences rows, hl columns.
    """

    ll: Array
    lh: Array
    hl: Array
    hh: Array


@partial(jax.jit, inline=True)
@shaped("z: B h w C")
def haar(z: Array) -> Subbands:
    """The orthonormal single-level Haar transform.

    An odd side is continued by its last row or column, which is PyWavelets' mode "symmetric". On even sides the
    transform is orthonormal: it keeps the sum of squares.

    Args:
      z: [B h w C], any real dtype; computed in float32.

    Returns:
      Subbands of [B ceil(h/2) ceil(w/2) C], float32.
    """
    z = jnp.asarray(z, jnp.float32)
    z = jnp.pad(z, ((0, 0), (0, z.shape[1] % 2), (0, z.shape[2] % 2), (0, 0)), mode="edge")
    upper_left, upper_right = z[:, ::2, ::2], z[:, ::2, 1::2]
    lower_left, lower_right = z[:, 1::2, ::2], z[:, 1::2, 1::2]
    # Differences of neighbours first: the details of a constant are exactly 0 in floating point.
    upper, lower = upper_left + upper_right, lower_left + lower_right
    upper_step, lower_step = upper_left - upper_right, lower_left - lower_right
    return Subbands(
        ll=(upper + lower) * 0.5,
        lh=(upper - lower) * 0.5,
        hl=(upper_step + lower_step) * 0.5,
        hh=(upper_step - lower_step) * 0.5,
    )


@partial(jax.jit, static_argnames="shape", inline=True)
def inverse_haar(bands: Subbands, shape: tuple[int, int] | None = None) -> Array:
    """The inverse of `haar`.

    Args:
      bands: four arrays of one shape [B h' w' C].
      shape: (h, w) of the latent the bands came from; None = (2 h', 2 w'). Needed only where a side was odd.

    Returns:
      [B h w C], float32.
    """
    ll, lh, hl, hh = (jnp.asarray(band, jnp.float32) for band in bands)
    upper, lower = ll + lh, ll - lh
    upper_step, lower_step = hl + hh, hl - hh
    z = jnp.stack([upper + upper_step, upper - upper_step, lower + lower_step, lower - lower_step]) * 0.5
    _, batch, h, w, channels = z.shape
    z = z.reshape(2, 2, batch, h, w, channels).transpose(2, 3, 0, 4, 1, 5).reshape(batch, 2 * h, 2 * w, channels)
    return z if shape is None else z[:, : shape[0], : shape[1]]


def _double(x: Array, axis: int) -> Array:
    """Twice as long by linear interpolation with half-pixel centres: weights 3/4 and 1/4, edges clamped."""
    size = x.shape[axis]
    first, body_left = (jax.lax.slice_in_dim(x, 0, n, axis=axis) for n in (1, size - 1))
    body_right, last = (jax.lax.slice_in_dim(x, n, size, axis=axis) for n in (1, size - 1))
    before = jnp.concatenate([first, body_left], axis)
    after = jnp.concatenate([body_right, last], axis)
    pairs = jnp.stack([x + 0.25 * (before - x), x + 0.25 * (after - x)], axis + 1)
    return pairs.reshape(x.shape[:axis] + (2 * size,) + x.shape[axis + 1 :])


@shaped("x: B h w C -> B _ _ C")
def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear resize with half-pixel centres, edges clamped and no antialiasing.

    Equal to torch.nn.functional.interpolate(mode="bilinear", align_corners=False). Doubling, the case of every even
    latent, is strided arithmetic instead of a gather or a product with a weight matrix.

    Args:
      x: [B h w C] float32.
      size: (h', w').
    """
    if size == (2 * x.shape[1], 2 * x.shape[2]):
        return _double(_double(x, 2), 1)
    shape = (x.shape[0], *size, x.shape[3])
    if shape == x.shape:
        return x
    return jax.image.resize(x, shape, "linear", antialias=False, precision=jax.lax.Precision.HIGHEST)


def _channel_mean(x: Array) -> Array:
    # As a product with a vector: XLA's CPU backend reduces a short minor axis element by element, which made the whole
    # map three to four times slower (benchmarks/saliency.py).
    weights = jnp.full((x.shape[-1],), 1 / x.shape[-1], x.dtype)
    return jnp.einsum("bhwc,c->bhw", x, weights, precision=jax.lax.Precision.HIGHEST)[..., None]


def _energy(lh: Array, hl: Array, hh: Array) -> Array:
    return _channel_mean(lh * lh + hl * hl + hh * hh)


def _haar_energies(z: Array, levels: int) -> list[Array]:
    energies = []
    for _ in range(levels):
        z, *details = haar(z)
        energies.append(_energy(*details))
    return energies


def _library_energies(z: Array, wavelet: str, levels: int) -> list[Array]:
    import jaxwt
    import pywt

    if wavelet not in pywt.wavelist(kind="discrete"):
        near = did_you_mean(wavelet, pywt.wavelist(kind="discrete"))
        raise UserError(f"There is no discrete wavelet '{wavelet}'.{near}")
    taps = pywt.Wavelet(wavelet).dec_len
    bands = jaxwt.wavedec2(jnp.moveaxis(jnp.asarray(z, jnp.float32), 3, 1), wavelet, level=levels, mode="symmetric")
    energies = []
    for level, details in enumerate(reversed(bands[1:]), 1):
        energy = _energy(*(jnp.moveaxis(band, 1, 3) for band in details))
        # Filters longer than two taps also give coefficients of the mirrored border. Coefficient k of this level is
        # centred on position 2^level k + (2^level - 1) (3 - taps) / 2, cell k of a grid over the latent alone on
        # 2^level k + (2^level - 1) / 2: kept is the part of the grid where the two agree, to half a cell.
        start = round((1 - 2.0**-level) * (taps / 2 - 1))
        h, w = (-(-side // 2**level) for side in z.shape[1:3])
        energies.append(energy[:, start : start + h, start : start + w])
    return energies


@partial(jax.jit, static_argnames=("wavelet", "levels"), inline=True)
@shaped("z: B h w C -> B _ _ 1")
def detail_energy(z: Array, wavelet: str = "haar", levels: int = 1) -> Array:
    """Energy of the details of a latent, on the grid of its finest level.

    The energy of one level j is the mean over all channels of lh^2 + hl^2 + hh^2, on a grid of ceil(h / 2^j) x
    ceil(w / 2^j): one coefficient per 2^j x 2^j positions, those centred on the mirrored border (they exist for
    filters longer than two taps) left out. With more levels than one, the energies of levels 2 ... `levels` are brought
    to the grid of level 1 bilinearly (half-pixel centres, edges clamped), and all are averaged with equal weight.
    `levels=1` with Haar is the energy of Latent Wavelet Diffusion (arXiv 2506.00433); its conclusion names the others
    as open directions.

    Args:
      z: [B h w C], any real dtype; computed in float32.
      wavelet: a discrete wavelet of PyWavelets; "haar" needs jax alone, the others jaxwt and PyWavelets.
      levels: at least 1; 2^levels must not exceed the longer side of the latent.

    Returns:
      [B ceil(h/2) ceil(w/2) 1] float32, at least 0.

    Raises:
      UserError: an unknown wavelet, or levels that the latent is too small for.
    """
    if levels < 1 or 2**levels > max(2, *z.shape[1:3]):
        sides = " x ".join(map(str, z.shape[1:3]))
        raise UserError(f"A latent of {sides} has no {levels} wavelet levels: 2^levels must fit its longer side.")
    energies = _haar_energies(z, levels) if wavelet in HAAR_NAMES else _library_energies(z, wavelet, levels)
    finest = energies[0].shape[1:3]
    return sum(resize_bilinear(energy, finest) for energy in energies) / levels
