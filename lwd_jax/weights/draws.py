"""The random numbers of initial weights: a generator that compiles quickly and gives the same numbers everywhere.

JAX's own (threefry) is some hundred operations for each parameter, and XLA repeats them in every kernel that reads it:
the initial state of the quickstart's autoencoder took half as long to compile as its training step. XLA's (rbg) gives
other numbers on every platform, and over a mesh every device would draw the whole parameter. Here a number is a hash of
its index and the parameter's key: a dozen operations, and a device draws its own part alone.

The hash is not for secrets, nor for the noise of training: that stays with JAX.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

_UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}
_STREAM = 0x9E3779B9  # 2^32 over the golden ratio: what keeps the two words of a key apart


def _hashed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of x turns about half of the result's.

    Shifts and factors are those of least bias that C. Wellons' search for such functions found (hash-prospector).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def _numbers(key: jax.Array, index: jax.Array) -> jax.Array:
    """uint32 of the shape of `index`, by a key [2]."""
    return _hashed(_hashed(index ^ key[0]) + key[1])


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """uint32 that number the places of an array; made axis by axis, so that a device counts its own part alone."""
    strides = (np.uint32(math.prod(shape[axis + 1 :]) % 2**32) for axis in range(len(shape)))
    counts = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride for axis, stride in enumerate(strides))
    return sum(counts, jnp.zeros(shape, jnp.uint32))


def _fold_in(key: jax.Array, data: jax.Array) -> jax.Array:
    words = jnp.asarray(data).astype(jnp.uint32) + np.array([0, _STREAM], np.uint32)
    return _numbers(key, words)


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    children = jax.vmap(functools.partial(_fold_in, key))(jnp.arange(math.prod(shape), dtype=jnp.uint32))
    return children.reshape(*shape, 2)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    return (_numbers(key, _indices(shape)) >> np.uint32(32 - width)).astype(_UNSIGNED[width])


DRAWS = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: _fold_in(jnp.zeros(2, jnp.uint32), seed),
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="draws",
    tag="draws",
)


def draws(key: jax.Array) -> jax.Array:
    """A key of this generator, by a key of any."""
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl=DRAWS)
