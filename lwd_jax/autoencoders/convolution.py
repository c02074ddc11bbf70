"""The autoencoder's convolution, in bands of rows where a whole one would not fit in host memory."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.shapes import Array

Padding = tuple[tuple[int, int], tuple[int, int]]

WHOLE = 1 << 28  # elements of an input or output up to which the CPU convolves it at once (1 GiB in float32)
BAND = 1 << 25  # elements of a band (128 MiB in float32)


class Spec(NamedTuple):
    """What of a convolution is known when it is traced.

    Attributes:
      stride: of both axes.
      padding: rows (top, bottom) and columns (left, right) of zeros.
      whole: elements of the larger of input and output beyond which a CPU works in bands. Accelerators never do: their
        compilers need no copies, and split convolutions over devices themselves.
      band: elements of a band.
    """

    stride: int
    padding: Padding
    whole: int = WHOLE
    band: int = BAND


def _whole(spec: Spec, x: Array, kernel: Array, bias: Array, plus: Array | None) -> Array:
    strides, numbers = (spec.stride, spec.stride), ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, strides, spec.padding, dimension_numbers=numbers) + bias
    return y if plus is None else y + plus


def _bits(x: Array) -> Array:
    """bfloat16 as integers: of what a loop slices and updates, XLA on a CPU would keep whole float32 copies."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x: Array, dtype) -> Array:
    """The inverse of `_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _in_bands(spec: Spec, x: Array, kernel: Array, bias: Array, plus: Array | None) -> Array:
    batch, height, width, channels = x.shape
    (top, bottom), columns = spec.padding
    rows = (height + top + bottom - kernel.shape[0]) // spec.stride + 1
    size = min(rows, max(1, spec.band // (batch * width * max(channels, kernel.shape[-1]) * spec.stride)))
    span = (size - 1) * spec.stride + kernel.shape[0]
    padded = jnp.pad(_bits(x), ((0, 0), (top, bottom), (0, 0), (0, 0)))  # fused with what made x
    added = None if plus is None else _bits(plus)
    within = spec._replace(padding=((0, 0), columns))

    def write(i, result):
        start = jnp.minimum(i * size, rows - size)  # the last band overlaps the one before it
        part = _values(jax.lax.dynamic_slice_in_dim(padded, start * spec.stride, span, axis=1), x.dtype)
        more = added if added is None else _values(jax.lax.dynamic_slice_in_dim(added, start, size, axis=1), x.dtype)
        part = _bits(_whole(within, part, kernel, bias, more))
        return jax.lax.dynamic_update_slice_in_dim(result, part, start, axis=1)

    shape = (batch, rows, (width + sum(columns) - kernel.shape[1]) // spec.stride + 1, kernel.shape[-1])
    # Every row is overwritten. Zeros would be one constant, kept and copied for all convolutions of this shape.
    result = jnp.full(shape, padded[0, 0, 0, 0])
    return _values(jax.lax.fori_loop(0, math.ceil(rows / size), write, result), x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _banded(spec: Spec, x: Array, kernel: Array, bias: Array, plus: Array | None) -> Array:
    """The same numbers, written band after band into the result; its gradient is that of the whole.

    XLA's CPU convolution first copies bfloat16 to float32, and keeps the float32 for what follows. This way only a band
    is float32, and what stays is bfloat16.
    """
    return _in_bands(spec, x, kernel, bias, plus)


def _banded_forward(spec, *operands):
    return _in_bands(spec, *operands), operands


def _banded_backward(spec, operands, gradient):
    # Whole: pictures of this size are encoded and decoded on a CPU, not trained on.
    return jax.vjp(functools.partial(_whole, spec), *operands)[1](gradient)


_banded.defvjp(_banded_forward, _banded_backward)


def convolve(spec: Spec, x: Array, kernel: Array, bias: Array, plus: Array | None = None) -> Array:
    """[B H W C] convolved with a [kh kw C D] kernel, plus a [D] bias, plus `plus` of the result's shape."""
    if math.prod(x.shape[:3]) * max(x.shape[3], kernel.shape[3] // spec.stride**2) <= spec.whole:
        return _whole(spec, x, kernel, bias, plus)
    ways = {"cpu": functools.partial(_banded, spec), "default": functools.partial(_whole, spec)}
    return jax.lax.platform_dependent(x, kernel, bias, plus, **ways)


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

    @nn.compact
    def __call__(self, x: Array, plus: Array | None = None) -> Array:
        """[B H W C] -> [B H' W' features] in `dtype`; `plus` is added to the result."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        around = (self.size // 2, self.size // 2)
        spec = Spec(self.stride, self.padding if self.padding is not None else (around, around))
        return convolve(spec, *(a if a is None else a.astype(self.dtype) for a in (x, kernel, bias, plus)))
