"""The autoencoder's convolution, in bands of rows where a whole one would not fit in host memory."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.shapes import Array

Padding = tuple[tuple[int, int], tuple[int, int]]

WHOLE = 1 << 28  # elements of an input or output up to which the CPU convolves it at once (1 GiB in float32)
_BAND = 1 << 25  # elements of a band (128 MiB in float32)


def _whole(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _banded(x: Array, kernel: Array, stride: int, padding: Padding, band: int) -> Array:
    """The same numbers, written band after band into the result.

    XLA's CPU convolution first copies bfloat16 to float32: this way it copies a band, not the picture.
    """
    batch, height, width, channels = x.shape
    (top, bottom), (left, right) = padding
    rows = (height + top + bottom - kernel.shape[0]) // stride + 1
    columns = (width + left + right - kernel.shape[1]) // stride + 1
    x = jnp.pad(x, ((0, 0), (top, bottom), (0, 0), (0, 0)))  # fused with what made x
    size = min(rows, max(1, band // (batch * width * max(channels, kernel.shape[-1]) * stride)))
    span = (size - 1) * stride + kernel.shape[0]

    def write(i, result):
        start = jnp.minimum(i * size, rows - size)  # the last band overlaps the one before it
        part = jax.lax.dynamic_slice_in_dim(x, start * stride, span, axis=1)
        part = _whole(part, kernel, stride, ((0, 0), padding[1]))
        return jax.lax.dynamic_update_slice_in_dim(result, part, start, axis=1)

    result = jnp.zeros((batch, rows, columns, kernel.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, math.ceil(rows / size), write, result)


def convolve(x: Array, kernel: Array, stride: int, padding: Padding, whole: int = WHOLE, band: int = _BAND) -> Array:
    """[B H W C] with a [kh kw C D] kernel.

    Args:
      whole: elements of the larger of input and output beyond which a CPU works in bands; accelerators never do, their
        compilers need no copies and split convolutions over devices themselves.
      band: elements of a band.
    """
    at_once = functools.partial(_whole, stride=stride, padding=padding)
    if x.shape[0] * x.shape[1] * x.shape[2] * max(x.shape[3], kernel.shape[3] // stride**2) <= whole:
        return at_once(x, kernel)
    in_bands = functools.partial(_banded, stride=stride, padding=padding, band=band)
    return jax.lax.platform_dependent(x, kernel, cpu=in_bands, default=at_once)


class Conv(nn.Module):
    """A convolution with bias.

    Attributes:
      features: output channels.
      size: of the square kernel.
      stride: of both axes.
      padding: rows (top, bottom) and columns (left, right) of zeros; None = as many as keep the size at stride 1.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        around = (self.size // 2, self.size // 2)
        padding = self.padding if self.padding is not None else (around, around)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding) + bias.astype(self.dtype)
