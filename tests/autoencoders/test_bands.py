"""Law: a convolution in bands is the convolution, gradients included; on a CPU large pictures take that road."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.autoencoders import bands
from lwd_jax.autoencoders.bands import Affine, Limits, Step, convolve, row_moments
from lwd_jax.parallel.mesh import abstract_mesh

SAME, HALVE = ((1, 1), (1, 1)), ((0, 1), (0, 1))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "stride, padding, size, height",
    [(1, SAME, 3, 10), (1, SAME, 3, 22), (2, HALVE, 3, 22), (1, ((0, 0), (0, 0)), 1, 10)],
)
def test_bands_equal_the_whole(stride, padding, size, height):
    """Bands that divide the height and bands that do not, one row, and more than the picture."""
    x, kernel, bias = draw(2, height, 14, 3), draw(size, size, 3, 5, seed=1), draw(5, seed=2)
    activate = Affine(*draw(2, 2, 1, 1, 3, seed=3))
    plus = draw(2, height // stride, 14 // stride, 5, seed=4)

    def both(whole, band):
        def loss(*operands):
            y = convolve(Step(stride, padding), *operands, limits=Limits(whole, band))
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(x, kernel, bias, activate, plus)

    wanted = jax.tree.leaves(both(1 << 20, 1))
    for band in (2 * 14 * 5 * (1 if height == 10 else 4), 1 << 20):
        for ours, theirs in zip(jax.tree.leaves(both(0, band)), wanted):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_accelerators_write_over_what_is_added():
    """Their road through the bands: the same result, and no memory of the result's size beside the operands."""
    x, plus = draw(2, 2, 250, 64, 8)
    kernel, bias = draw(3, 3, 8, 8, seed=1), draw(8, seed=2)
    banded = functools.partial(bands._convolve_bands, Step(1, SAME), 2 * 64 * 8 * 20, lambda x: x)
    compiled = jax.jit(banded, donate_argnums=4).lower(x, kernel, bias, None, plus, None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 2
    wanted = jax.jit(functools.partial(bands._convolve_whole, Step(1, SAME)))(x, kernel, bias, None, plus, None)
    np.testing.assert_allclose(compiled(x, kernel, bias, None, plus, None), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mesh, loops",
    [((1, 1, 1, 1), True), ((2, 2, 1, 1), True), ((4, 1, 1, 1), False), ((1, 1, 2, 1), True), ((1, 1, 3, 1), False)],
)
def test_accelerators_work_large_pictures_in_bands(mesh, loops):
    """Not those whose rows do not divide over devices, nor batches of which each device has a small part."""
    x = jax.ShapeDtypeStruct((4, 32, 32, 8), jnp.bfloat16)
    limits = Limits(accelerator=x.size // 4 - (mesh != (4, 1, 1, 1)), accelerator_band=1 << 10)
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        step = functools.partial(convolve, Step(1, SAME), limits=limits)
        operands = (x, jax.ShapeDtypeStruct((3, 3, 8, 8), x.dtype), jax.ShapeDtypeStruct((8,), x.dtype))
        lowered = jax.jit(step).trace(*operands).lower(lowering_platforms=("tpu",))
    assert ("stablehlo.while" in lowered.as_text()) is loops


@pytest.mark.parametrize("dtype, offset", [(jnp.float32, 1), (jnp.float32, 3000), (jnp.bfloat16, 1)])
def test_row_moments(dtype, offset):
    """Mean and variance, the latter also of values far from zero for their spread."""
    x = (draw(2, 11, 14, 3) + offset).astype(dtype)
    wide = np.asarray(x, np.float64)
    wanted = wide.mean(2), wide.var(2)
    for limits in (Limits(), Limits(0, 1), Limits(0, 2 * 14 * 3 * 4)):
        ours = jax.jit(functools.partial(row_moments, limits=limits))(x)
        for moment, theirs in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(moment, theirs, rtol=1e-5, atol=1e-6)


def with_gradients(limits, x, kernel, bias):
    """A convolution and the gradients of its mean square."""

    def loss(*operands):
        y = convolve(Step(1, SAME), *operands, limits=limits)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), y

    gradients, y = jax.device_get(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, kernel, bias))
    return [y, *gradients]


@pytest.mark.parametrize("result", [jnp.bfloat16, jnp.float32])
def test_bands_in_bfloat16(result):
    """With a result of their own dtype, and with one that keeps the float32 sums; all near float32 operands."""
    x, kernel = draw(1, 20, 14, 3).astype(jnp.bfloat16), draw(3, 3, 3, 5, seed=1).astype(jnp.bfloat16)
    bias = np.ones(5, result)
    exact = with_gradients(Limits(), *(a.astype(np.float32) for a in (x, kernel, bias)))
    for limits in (Limits(0, 14 * 5 * 3), Limits()):
        road = with_gradients(limits, x, kernel, bias)
        assert [a.dtype for a in road] == [result, jnp.bfloat16, jnp.bfloat16, result]
        for ours, wanted in zip(road, exact):
            assert np.linalg.norm(ours.astype(np.float32) - wanted) < 5e-3 * np.linalg.norm(wanted)
        if result == jnp.float32:
            np.testing.assert_allclose(road[0], exact[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limits", [Limits(0, 14 * 5 * 3), Limits()])
def test_the_gradient_of_a_bias_is_summed_in_float32(limits):
    """Over the positions of a picture: in bfloat16 ones added one by one would end at 256. It is rounded once."""
    x, kernel = np.zeros((2, 60, 14, 3), jnp.bfloat16), np.zeros((3, 3, 3, 5), jnp.bfloat16)
    weight = np.random.default_rng(0).uniform(0.9, 1.1, (2, 60, 14, 5)).astype(jnp.bfloat16)

    def loss(bias):
        return jnp.sum(convolve(Step(1, SAME), x, kernel, bias, limits=limits).astype(jnp.float32) * weight)

    gradient = np.asarray(jax.jit(jax.grad(loss))(np.zeros(5, jnp.bfloat16)), np.float64)
    np.testing.assert_allclose(gradient, weight.astype(np.float64).sum((0, 1, 2)), rtol=2**-8)


def test_bands_need_little_memory_on_a_cpu():
    """Norm-like work before and after a bfloat16 convolution of 64 MiB. In bands no float32 picture is kept."""
    x = jax.ShapeDtypeStruct((1, 1024, 1024, 32), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((32,), jnp.bfloat16)

    def temporaries(whole):
        def step(x, kernel, bias):
            limits = Limits(whole, 1 << 20)
            y = convolve(Step(1, SAME), jnp.tanh(x), kernel, bias, limits=limits)
            mean, variance = (part.mean(1, keepdims=True)[:, :, None] for part in row_moments(y, limits))
            return jnp.tanh((y.astype(jnp.float32) - mean) * variance).astype(jnp.bfloat16)

        return jax.jit(step).lower(x, kernel, bias).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1 << 30) > 250 * 2**20  # the control: were this to change, bands would be idle
    assert temporaries(0) < 144 * 2**20  # input, result, and bands


@pytest.mark.parametrize("dtype, limit", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_activation_before_a_convolution(dtype, limit):
    """silu(x factor + offset) and its gradients are those of the formula; x alone is kept for them."""
    x = (3 * draw(2, 9, 14, 3)).astype(dtype)
    activate, weight = Affine(*draw(2, 2, 1, 1, 3, seed=1)), draw(*x.shape, seed=2)

    def plain(activate, x):
        return jnp.sum(weight * jax.nn.silu(x.astype(jnp.float32) * activate.factor + activate.offset))

    def ours(activate, x):
        return jnp.sum(weight * bands._activated(activate, x).astype(jnp.float32))

    for got, wanted in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(ours, (0, 1)))(activate, x)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(plain, (0, 1)))(activate, x.astype(np.float32))),
        strict=True,
    ):
        assert np.linalg.norm(np.asarray(got, np.float32) - wanted) <= limit * np.linalg.norm(wanted)
    kept = jax.tree.leaves(jax.vjp(bands._activated, activate, x)[1])
    assert sum(leaf.nbytes for leaf in kept) <= x.nbytes + 2 * activate.factor.nbytes
