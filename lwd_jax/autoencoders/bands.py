"""Convolution and row moments of pictures, worked in bands of rows where a CPU would need too much memory at once.

XLA's CPU backend copies bfloat16 to float32 before a convolution and before two sums over the same array, and keeps the
copies: 8 GiB each for the first level of a 5312 x 2988 picture. In bands only a band is ever float32. Accelerators need
no such copies, and split whole convolutions over devices themselves, so there the arrays stay whole.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.shapes import Array

Padding = tuple[tuple[int, int], tuple[int, int]]


class Limits(NamedTuple):
    """When a CPU works in bands, in elements."""

    whole: int = 1 << 28  # of the array that is worked at once: 1 GiB in float32
    band: int = 1 << 25  # of a band: 128 MiB


def _by_platform(whole: Callable, banded: Callable) -> Callable:
    """`banded` on a CPU, `whole` elsewhere; the gradient is that of `whole`.

    Pictures of this size are encoded and decoded on a CPU, not trained on.
    """
    on_cpu = jax.custom_vjp(banded)
    on_cpu.defvjp(lambda *x: (banded(*x), x), lambda x, gradient: jax.vjp(whole, *x)[1](gradient))
    return lambda *x: jax.lax.platform_dependent(*x, cpu=on_cpu, default=whole)


def _bits(x: Array) -> Array:
    """bfloat16 as integers: what a loop slices and updates would be kept as float32 otherwise."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x: Array, dtype) -> Array:
    """The inverse of `_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _rows(x: Array, start: Array, count: int, dtype) -> Array:
    return _values(jax.lax.dynamic_slice_in_dim(x, start, count, axis=1), dtype)


def _write_bands(result: Array, size: int, band: Callable[[Array], Array]) -> Array:
    """result with every `size` rows replaced by band(first row); the last band may overlap the one before it."""
    rows = result.shape[1]

    def write(i, result):
        start = jnp.minimum(i * size, rows - size)
        return jax.lax.dynamic_update_slice_in_dim(result, band(start), start, axis=1)

    return jax.lax.fori_loop(0, math.ceil(rows / size), write, result)


class Step(NamedTuple):
    """How a convolution moves: stride of both axes; zeros around, rows (top, bottom) and columns (left, right)."""

    stride: int
    padding: Padding


class Affine(NamedTuple):
    """x -> x * factor + offset in float32, both [B 1 1 C]: group normalisation, once its moments are known."""

    factor: Array
    offset: Array

    def __call__(self, x: Array) -> Array:
        return x.astype(jnp.float32) * self.factor + self.offset


def _activated(activate: Affine | None, x: Array) -> Array:
    return x if activate is None else nn.silu(activate(x)).astype(x.dtype)


def _convolve_whole(
    step: Step, x: Array, kernel: Array, bias: Array, activate: Affine | None, plus: Array | None
) -> Array:
    x = _activated(activate, x)
    strides, numbers = (step.stride, step.stride), ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, strides, step.padding, dimension_numbers=numbers) + bias
    return y if plus is None else y + plus


def _convolve_bands(
    step: Step, band: int, x: Array, kernel: Array, bias: Array, activate: Affine | None, plus: Array | None
) -> Array:
    batch, height, width, channels = x.shape
    vertical, horizontal = step.padding
    rows = (height + sum(vertical) - kernel.shape[0]) // step.stride + 1
    columns = (width + sum(horizontal) - kernel.shape[1]) // step.stride + 1
    most = (height - kernel.shape[0]) // step.stride + 1
    size = min(most, max(1, band // (batch * width * max(channels, kernel.shape[-1]) * step.stride)))
    span = (size - 1) * step.stride + kernel.shape[0]
    bits, added = _bits(x), None if plus is None else _bits(plus)

    def convolved(start):
        # Zeros go around the activated band, not around x: all large arrays have one size and take each other's places.
        wanted = start * step.stride - vertical[0]
        there = jnp.clip(wanted, 0, height - span)
        part = _activated(activate, _rows(bits, there, span, x.dtype))
        part = jnp.pad(part, ((0, 0), vertical, (0, 0), (0, 0)))
        part = _rows(part, wanted - there + vertical[0], span, x.dtype)
        more = None if added is None else _rows(added, start, size, x.dtype)
        return _bits(_convolve_whole(Step(step.stride, ((0, 0), horizontal)), part, kernel, bias, None, more))

    # Every row is overwritten. The value at the start is one of x, so that this buffer is made when x is there:
    # constants would be made at the program's start, for all convolutions at once.
    result = jnp.full((batch, rows, columns, kernel.shape[-1]), bits[0, 0, 0, 0])
    return _values(_write_bands(result, size, convolved), x.dtype)


def convolve(
    step: Step,
    x: Array,
    kernel: Array,
    bias: Array,
    activate: Affine | None = None,
    plus: Array | None = None,
    limits: Limits = Limits(),
) -> Array:
    """silu(activate(x)), [B H W C], convolved with a [kh kw C D] kernel, plus a [D] bias, plus `plus`.

    Without `activate`, x itself. `plus` has the shape of the result.
    """
    whole = functools.partial(_convolve_whole, step)
    elements = math.prod(x.shape[:3]) * max(x.shape[3], kernel.shape[3] // step.stride**2)
    if elements <= limits.whole or x.shape[1] < kernel.shape[0]:
        return whole(x, kernel, bias, activate, plus)
    return _by_platform(whole, functools.partial(_convolve_bands, step, limits.band))(x, kernel, bias, activate, plus)


def _moments_whole(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return jnp.stack([x.mean(2), jnp.square(x).mean(2)], axis=-1)


def _moments_bands(band: int, x: Array) -> Array:
    batch, height, width, channels = x.shape
    size = min(height, max(1, band // (batch * width * channels)))
    bits = _bits(x)
    result = jnp.zeros((batch, height, channels, 2), jnp.float32)
    return _write_bands(result, size, lambda start: _moments_whole(_rows(bits, start, size, x.dtype)))


def row_moments(x: Array, limits: Limits = Limits()) -> Array:
    """Mean and mean square over each row and channel: [B H W C] -> [B H C 2] float32."""
    if x.size <= limits.whole:
        return _moments_whole(x)
    return _by_platform(_moments_whole, functools.partial(_moments_bands, limits.band))(x)


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
    def __call__(self, x: Array, activate: Affine | None = None, plus: Array | None = None) -> Array:
        """[B H W C] -> [B H' W' features] in `dtype`, of silu(activate(x)) where given; `plus` is added to it."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        around = (self.size // 2, self.size // 2)
        step = Step(self.stride, self.padding if self.padding is not None else (around, around))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return convolve(step, x, kernel, bias, activate, None if plus is None else plus.astype(self.dtype))
