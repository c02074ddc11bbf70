"""Convolution and row moments of pictures, whose rows may lie over devices, and which are worked in bands of rows where
the whole would need too much memory at once.

XLA's CPU backend copies bfloat16 to float32 before a convolution and before two sums over the same array, and keeps the
copies: 8 GiB each for the first level of a 5312 x 2988 picture. In bands only a band is ever float32. Accelerators need
no such copies, but there too an array of that level takes 4 GiB at 4096 px. Band by band, what a convolution is added
to is written over, and two such arrays are there at once, not three.

Where rows lie over the axis `context` of the mesh, a device gets the rows that its kernel reaches beyond its own from
its neighbours, and nothing else moves. The compiler would split such convolutions itself, but not in bands, and of what
one reads it keeps three copies on a TPU.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from lwd_jax.nn.layers import accumulated, parameter, plus_bias, precision_of
from lwd_jax.nn.platform import platform
from lwd_jax.nn.sharding import axis_size, batch_axes
from lwd_jax.shapes import Array

Padding = tuple[tuple[int, int], tuple[int, int]]


class Limits(NamedTuple):
    """When a device works in bands, in elements of the largest array of a step."""

    cpu: int = 1 << 28  # above it a CPU does: 1 GiB in float32
    cpu_band: int = 1 << 25  # and a band is so large: 128 MiB
    accelerator: int = 1 << 30  # 2 GiB in bfloat16
    accelerator_band: int = 1 << 27


def _by_platform(whole: Callable, cpu: Callable, other: Callable) -> Callable:
    """`cpu` on a CPU, `other` elsewhere; the gradient is that of `whole`.

    Pictures of this size are encoded and decoded, not trained on.
    """

    def road(*x):
        return jax.lax.platform_dependent(*x, cpu=cpu, default=other)

    chosen = jax.custom_vjp(road)
    chosen.defvjp(lambda *x: (road(*x), x), lambda x, gradient: jax.vjp(whole, *x)[1](gradient))
    return chosen


def _bits(x: Array) -> Array:
    """bfloat16 as integers: what a loop slices and updates would be kept as float32 otherwise."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x: Array, dtype) -> Array:
    """The inverse of `_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _rows(x: Array, start: Array, count: int, dtype) -> Array:
    return _values(jax.lax.dynamic_slice_in_dim(x, start, count, axis=1), dtype)


def _write_bands(result: Array, size: int, band: Callable[[Array, Array, int], Array]) -> Array:
    """result with every `size` rows, and those that are left, replaced by band(result so far, first row, how many)."""
    number, left = divmod(result.shape[1], size)

    def write(i, result, count=size):
        return jax.lax.dynamic_update_slice_in_dim(result, band(result, i * size, count), i * size, axis=1)

    result = jax.lax.fori_loop(0, number, write, result)
    return write(number, result, left) if left else result


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


@jax.custom_vjp
def _silu(activate: Affine, x: Array) -> Array:
    return nn.silu(activate(x)).astype(x.dtype)


def _silu_backward(operands: tuple[Affine, Array], gradient: Array):
    # By hand, so that x alone is kept for it: of its own JAX would keep two float32 arrays of that size.
    (activate, x), wide = operands, operands[1].astype(jnp.float32)
    y = activate(x)
    sigmoid = jax.nn.sigmoid(y)
    gradient = gradient.astype(jnp.float32) * sigmoid * (1 + y * (1 - sigmoid))
    of_affine = Affine((gradient * wide).sum((1, 2), keepdims=True), gradient.sum((1, 2), keepdims=True))
    return of_affine, (gradient * activate.factor).astype(x.dtype)


_silu.defvjp(lambda activate, x: (_silu(activate, x), (activate, x)), _silu_backward)


def _activated(activate: Affine | None, x: Array) -> Array:
    return x if activate is None else _silu(activate, x)


def _product(step: Step, x: Array, kernel: Array, dtype=None) -> Array:
    """x [B H W C] convolved with a [kh kw C D] kernel; float32 operands in full precision."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (step.stride, step.stride),
        step.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of(x.dtype),
        preferred_element_type=dtype,
    )


Halo = tuple[Array, Array]


def _halo(step: Step, x: Array, activate: Affine | None) -> Halo:
    """The activated rows above and below a device's own, from its neighbours over `context`; zeros at the edges."""
    last = jax.lax.axis_size("context") - 1
    (above, below), height = step.padding[0], x.shape[1]

    def received(start, count, pairs):
        rows = _activated(activate, x[:, start : start + count])
        return jax.lax.ppermute(rows, "context", pairs) if count else rows

    return (
        received(height - above, above, [(i, i + 1) for i in range(last)]),
        received(0, below, [(i + 1, i) for i in range(last)]),
    )


def _convolve_whole(
    step: Step, x: Array, kernel: Array, bias: Array, activate: Affine | None, plus: Array | None, halo: Halo | None
) -> Array:
    x, (vertical, horizontal) = _activated(activate, x), step.padding
    if halo is not None:
        x, vertical = jnp.concatenate([halo[0], x, halo[1]], axis=1), (0, 0)
    product = functools.partial(_product, Step(step.stride, (vertical, horizontal)))
    if bias.dtype != x.dtype:
        product = functools.partial(accumulated, product, x.dtype)
    y = plus_bias(product(x, kernel), bias)
    return y if plus is None else y + plus


def _convolve_bands(
    step: Step,
    band: int,
    hold: Callable[[Array], Array],
    x: Array,
    kernel: Array,
    bias: Array,
    activate: Affine | None,
    plus: Array | None,
    halo: Halo | None,
) -> Array:
    """`_convolve_whole` in bands of about `band` elements; the result takes the place of `plus`.

    hold: as what a loop keeps large arrays.
    """
    batch, height, width, channels = x.shape
    vertical, horizontal = step.padding
    rows = (height + sum(vertical) - kernel.shape[0]) // step.stride + 1
    columns = (width + sum(horizontal) - kernel.shape[1]) // step.stride + 1
    most = (height - kernel.shape[0]) // step.stride + 1  # rows of a band that lies within x
    size = min(most, max(1, band // (batch * width * max(channels, kernel.shape[-1]) * step.stride)))
    size = math.ceil(rows / math.ceil(rows / size))
    held = hold(x)
    above, below = halo or (jnp.zeros((batch, count, width, channels), x.dtype) for count in vertical)

    def convolved(result, start, count):
        # The halo goes around the activated band, not around x: all large arrays have one size and take each other's
        # places.
        span = (count - 1) * step.stride + kernel.shape[0]
        wanted = start * step.stride - vertical[0]
        there = jnp.clip(wanted, 0, height - span)
        part = _activated(activate, _rows(held, there, span, x.dtype))
        part = jnp.concatenate([above, part, below], axis=1)
        part = _rows(part, wanted - there + vertical[0], span, x.dtype)
        more = None if plus is None else _rows(result, start, count, bias.dtype)
        return hold(_convolve_whole(Step(step.stride, ((0, 0), horizontal)), part, kernel, bias, None, more, None))

    if plus is None:
        # Every row is overwritten. The value at the start is one of x, so that this buffer is made when x is there:
        # constants would be made at the program's start, for all convolutions at once.
        like = jax.eval_shape(hold, jax.ShapeDtypeStruct((), bias.dtype))
        result = jnp.full((batch, rows, columns, kernel.shape[-1]), held[0, 0, 0, 0].astype(like.dtype))
    else:
        result = hold(plus)
    return _values(_write_bands(result, size, convolved), bias.dtype)


def _axes(step: Step, x: Array, size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of several devices that the pictures of x [B H W C] lie over and that its rows do, where they divide.

    Rows do where every device reads whole steps of its own, which its halo completes.
    """
    pictures = tuple(axis for axis in batch_axes(len(x)) or () if axis_size(axis) > 1)
    parts, height = axis_size("context"), x.shape[1]
    even = height % (parts * step.stride) == 0 and sum(step.padding[0]) == size - step.stride
    return pictures, ("context",) if parts > 1 and even and height // parts >= size else ()


def _undivided(x: Array | None) -> Array | None:
    """x [B H W C], its rows whole on every device of `context`.

    Rows that do not divide and come out of a reshape XLA lays over a part of that axis, and what is left of it holds
    copies: the gradient of a kernel was then counted once a copy (jax 0.10.2 and 0.12.0: 6 rows over 4 devices).
    """
    if x is None:
        return None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(len(x)), None, None, None))


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

    Without `activate`, x itself. `plus` has the shape of the result. Bias and `plus` have its dtype: that of x and
    kernel, or float32, which keeps what the products were summed in.
    """
    pictures, rows = _axes(step, x, len(kernel))
    settled = _undivided if axis_size("context") > 1 and not rows else lambda x: x
    x, plus = settled(x), settled(plus)
    elements = math.prod(x.shape[:3]) * max(x.shape[3], kernel.shape[3] // step.stride**2)
    elements //= math.prod(map(axis_size, pictures))
    elsewhere = elements > limits.accelerator and (rows or axis_size("context") == 1)
    road = whole = functools.partial(_convolve_whole, step)
    if x.shape[1] >= len(kernel) and (elsewhere or elements > limits.cpu):
        banded = functools.partial(_convolve_bands, step)
        on_cpu = functools.partial(banded, limits.cpu_band, _bits)
        on_others = functools.partial(banded, limits.accelerator_band, lambda x: x) if elsewhere else whole
        road = _by_platform(whole, on_cpu, on_others)

    def own(x, kernel, bias, activate, plus):
        return road(x, kernel.astype(x.dtype), bias, activate, plus, _halo(step, x, activate) if rows else None)

    if pictures or rows:
        # By hand: left to the compiler, the axis that splits a kernel's channels can split those of the feature maps
        # too, and all of them move.
        every, each = PartitionSpec(), PartitionSpec(pictures or None)
        layout = PartitionSpec(pictures or None, rows or None)
        specs, axes = (layout, every, every, each, layout), {*pictures, *rows}
        own = jax.shard_map(own, in_specs=specs, out_specs=layout, axis_names=axes, check_vma=False)
        if platform() == "cpu":  # XLA:CPU ends the process over the sum of its gradient over devices in bfloat16
            kernel = kernel.astype(jnp.float32)
    return settled(own(x, kernel, bias, activate, plus))


def _moments_whole(x: Array) -> tuple[Array, Array]:
    # About a value of the row itself, which changes nothing but the rounding: E[x^2] - E[x]^2 loses the spread of
    # values far from zero. The middle one, because the zeros around a picture set its edges apart.
    about = x[:, :, x.shape[2] // 2, None].astype(jnp.float32)
    x = x.astype(jnp.float32) - about
    mean, square = x.mean(2), jnp.square(x).mean(2)
    return mean + about[:, :, 0], jnp.maximum(square - jnp.square(mean), 0.0)


def _moments_bands(band: int, x: Array) -> tuple[Array, Array]:
    batch, height, width, channels = x.shape
    size = min(height, max(1, band // (batch * width * channels)))
    bits = _bits(x)
    result = jnp.zeros((batch, height, 2, channels), jnp.float32)

    def moments(_, start, count):
        return jnp.stack(_moments_whole(_rows(bits, start, count, x.dtype)), axis=2)

    return tuple(jnp.moveaxis(_write_bands(result, size, moments), 2, 0))


def row_moments(x: Array, limits: Limits = Limits()) -> tuple[Array, Array]:
    """Mean and variance over each row and channel: [B H W C] -> two of [B H C] float32. For values alone: gradients are
    those of what is made of them (`kl.group_affine`).
    """
    if x.size <= limits.cpu:
        return _moments_whole(x)
    return jax.lax.platform_dependent(x, cpu=functools.partial(_moments_bands, limits.cpu_band), default=_moments_whole)


class Conv(nn.Module):
    """A convolution with bias.

    Attributes:
      features: output channels.
      size: of the square kernel.
      stride: of both axes.
      padding: rows (top, bottom) and columns (left, right) of zeros; None = as many as keep the size at stride 1.
      dtype: of the operands.
      out_dtype: of the result; None = dtype. float32 with bfloat16 operands keeps the accumulator.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    out_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, activate: Affine | None = None, plus: Array | None = None) -> Array:
        """[B H W C] -> [B H' W' features] in `out_dtype`, of silu(activate(x)) where given; `plus` is added to it."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        around = (self.size // 2, self.size // 2)
        step = Step(self.stride, self.padding if self.padding is not None else (around, around))
        out_dtype = self.out_dtype or self.dtype
        x, kernel, bias = x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(out_dtype)
        return convolve(step, x, kernel, bias, activate, None if plus is None else plus.astype(out_dtype))
