"""Layers that every transformer here is made of. Parameters are kept in `param_dtype` and cast where they are used, so
inside a scanned body a gather over the mesh moves the cast copy of one block, not the float32 masters of all."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax import lax

from lwd_jax.nn.platform import platform
from lwd_jax.nn.sharding import axis_size

XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros
NORMAL = nn.initializers.normal(0.02)

# Leaves of an adapter beside a kernel [in, out]: a [in, r] and b [r, out] of the pair that trains, its scale [], and of
# the pair that does not (see lwd_jax.adapters.factors).
TRAINED, SCALE, FIXED = ("lora_a", "lora_b"), "lora_scale", ("fixed_a", "fixed_b")
OPERAND = "kernel_operand"  # beside a kernel: what its gradient is taken by, see `_rounded`


def precision_of(dtype) -> lax.Precision | None:
    """Of products whose operands are of this dtype. By default float32 operands would be rounded: to TF32 on a GPU, to
    bfloat16 on a TPU. What is float32 here is meant to be; bfloat16 operands need no more than the default."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def plus_bias(y, bias):
    """y [... D] + bias [D], in the dtype of y; the bias's gradient is a sum in float32.

    JAX would sum it in the dtype of y: over 65,536 tokens in bfloat16 it was 4 % off on a CPU.
    """
    wide = bias.astype(jnp.promote_types(bias.dtype, jnp.float32))
    return y + lax.broadcast_in_dim(wide, y.shape, (y.ndim - 1,)).astype(y.dtype)


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], dtype) -> jax.Array:
    """`module.param` of these arguments. Where the parameter is there, its shape alone is looked at: to know that shape
    Flax would trace the initialiser, at every call, a tenth of the time that tracing a step takes.

    Raises:
      flax.errors.ScopeParamShapeError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
    return value


@jax.custom_vjp
def _rounded(kernel, operand):
    """kernel in the dtype of `operand`, whose gradient is that of the result; the kernel itself has none.

    The value of `operand` is not read, so it takes no memory: it stands for the copy of the kernel that products take,
    which is made of a float32 master where it is used. A gradient by the master would be the same numbers in float32.
    """
    # Rounded before it is converted: the TPU compiler would convert a whole stack before the loop, and keep it.
    kind = jnp.finfo(operand.dtype)
    return lax.reduce_precision(kernel, kind.nexp, kind.nmant).astype(operand.dtype)


_rounded.defvjp(lambda kernel, operand: (_rounded(kernel, operand), None), lambda _, gradient: (None, gradient))


class Dense(nn.Module):
    """y = x kernel + bias over the last axis; kernel [in, out].

    Beside the kernel there may be an adapter (lwd_jax.adapters), leaves of the same tree: y += scale x a b, of which a
    and b train, and y += x a b, of which nothing does. The products a b are never formed, nor a gradient of that size.

    Attributes:
      features: size of the output axis.
      dtype: of the operands of the product; float32 is computed in full precision, see `precision_of`.
      out_dtype: of the result and of the bias; None = dtype. float32 with bfloat16 operands keeps the accumulator.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    out_dtype: jnp.dtype | None = None
    kernel_init: Callable = XAVIER

    @nn.compact
    def __call__(self, *parts):
        """x, or the parts that make it up in order along its last axis; neither they nor their gradients are joined."""
        shape = (sum(x.shape[-1] for x in parts), self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.param_dtype)
        if self.has_variable("params", OPERAND):
            kernel = _rounded(kernel, self.get_variable("params", OPERAND))
        bias = parameter(self, "bias", ZEROS, (self.features,), self.param_dtype)
        out_dtype = self.out_dtype or self.dtype
        y = plus_bias(self._products(parts, kernel, out_dtype), bias)
        adapted = self.has_variable("params", SCALE) or self.has_variable("params", FIXED[0])
        return y + self.adapter(jnp.concatenate(parts, -1)) if adapted else y

    def dropped(self, x):
        """What the trained factors see of x: all of it, unless training drops a part (`adapters.dropout`)."""
        return x

    def adapter(self, x):
        """What the factors beside the kernel add to y."""
        seen, narrow, wide = x.astype(self.dtype), [], []
        if self.has_variable("params", SCALE):
            a, b, scale = (self.get_variable("params", name) for name in (*TRAINED, SCALE))
            narrow.append(self._product(self.dropped(seen), a, self.dtype))
            wide.append(scale * b)
        if self.has_variable("params", FIXED[0]):
            a, b = (self.get_variable("params", name) for name in FIXED)
            narrow.append(self._product(seen, a, self.dtype))
            wide.append(b)
        # One sum over all columns: at the start of minor components they cancel in it before anything is rounded.
        return self._product(jnp.concatenate(narrow, -1), jnp.concatenate(wide), self.out_dtype or self.dtype)

    def _products(self, parts, kernel, out_dtype):
        if len(parts) == 1:
            return self._product(*parts, kernel, out_dtype)

        product = functools.partial(self._product, out_dtype=jnp.float32)
        if out_dtype == self.dtype:
            product = functools.partial(accumulated, self._product, self.dtype)

        # The backward pass cuts the kernel itself: kept from the forward one, the cuts would be a copy of every kernel.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def total(parts, kernel):
            rows = jnp.split(kernel, list(itertools.accumulate(x.shape[-1] for x in parts[:-1])))
            return sum(product(*pair) for pair in zip(parts, rows))

        return total(parts, kernel).astype(out_dtype)

    def _product(self, x, kernel, out_dtype):
        # With more than one axis of rows XLA:CPU transposes a copy of the result's gradient for the kernel's, a tenth
        # of a step's time. Over `context` the rows of a picture lie apart and cannot be one axis with the next one's.
        one_axis = platform() == "cpu" and axis_size("context") == 1
        rows = x.reshape(-1, x.shape[-1]) if one_axis else x
        y = lax.dot_general(
            rows.astype(self.dtype),
            kernel.astype(self.dtype),
            (((rows.ndim - 1,), (0,)), ((), ())),
            precision=precision_of(self.dtype),
            preferred_element_type=out_dtype,
        )
        return y.reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def accumulated(product: Callable, dtype, x, kernel):
    """product(x, kernel, float32), the sums of products of operands of a dtype as they are. Its gradient is rounded to
    that dtype, as it is on its way into every other product: in float32 a convolution's transpose does not take it, and
    a GPU would multiply at half the rate.

    Args:
      product: (x, kernel, dtype of the result) -> array, bilinear.
      dtype: of the operands.
    """
    return product(x, kernel, jnp.float32)


def _accumulated_forward(product, dtype, x, kernel):
    return product(x, kernel, jnp.float32), (x, kernel)


def _accumulated_backward(product, dtype, operands, gradient):
    return jax.vjp(lambda x, kernel: product(x, kernel, dtype), *operands)[1](gradient.astype(dtype))


accumulated.defvjp(_accumulated_forward, _accumulated_backward)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; computed in float32, returned in the dtype of x."""

    eps: float = 1e-6
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return _rms_norm(x, parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype), self.eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x, scale, eps: float):
    """Its inputs alone are kept for the backward pass, not their float32 copies."""
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x, eps: float = 1e-6):
    """(x - mean) / sqrt(var + eps) over the last axis, without scale and bias; float32 whatever the dtype of x."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x):
    """GELU in its tanh form, as SD3, FLUX and PixArt use it. Its input alone is kept for the backward pass: of its own
    JAX keeps four more arrays of that size, the widest of a block.
    """
    return jax.nn.gelu(x, approximate=True)
