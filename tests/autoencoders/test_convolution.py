"""Law: a convolution in bands is the convolution, gradients included; on a CPU large pictures take that road."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.autoencoders.convolution import Spec, convolve

SAME, HALVE = ((1, 1), (1, 1)), ((0, 1), (0, 1))


@pytest.mark.parametrize("stride, padding, size", [(1, SAME, 3), (2, HALVE, 3), (1, ((0, 0), (0, 0)), 1)])
@pytest.mark.parametrize("height", [10, 22])
def test_bands_equal_the_whole(stride, padding, size, height):
    """Bands that divide the height and bands that do not, one row, and more than the picture."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, height, 14, 3))
    kernel = jax.random.normal(keys[1], (size, size, 3, 5))
    bias = jax.random.normal(keys[2], (5,))
    plus = jax.random.normal(keys[3], (2, height // stride, 14 // stride, 5))

    def both(whole, band):
        def loss(*operands):
            y = convolve(Spec(stride, padding, whole, band), *operands)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(x, kernel, bias, plus)

    wanted = jax.tree.leaves(both(1 << 20, 1))
    for band in (1, 2 * 14 * 5 * 4, 1 << 20):
        for ours, theirs in zip(jax.tree.leaves(both(0, band)), wanted):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bands_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (1, 20, 14, 3), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5), jnp.bfloat16)
    ours, wanted = (
        jax.jit(functools.partial(convolve, Spec(1, SAME, whole, 14 * 5 * 3)))(x, kernel, jnp.ones(5, jnp.bfloat16))
        for whole in (0, 1 << 20)
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2e-2, atol=2e-2)


def test_bands_need_little_memory_on_a_cpu():
    """Norm-like work before and after a bfloat16 convolution of 64 MiB. In bands no float32 picture is kept."""
    x = jax.ShapeDtypeStruct((1, 1024, 1024, 32), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((32,), jnp.bfloat16)

    def temporaries(whole):
        def step(x, kernel, bias):
            y = convolve(Spec(1, SAME, whole, 1 << 20), jnp.tanh(x), kernel, bias).astype(jnp.float32)
            return jnp.tanh(y - y.mean()).astype(jnp.bfloat16)

        return jax.jit(step).lower(x, kernel, bias).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1 << 30) > 250 * 2**20  # the control: were this to change, bands would be idle
    assert temporaries(0) < 144 * 2**20  # the padded input, the result, and bands
