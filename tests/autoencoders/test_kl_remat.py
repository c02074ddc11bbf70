"""Laws of the autoencoder's rematerialisation: it changes memory and nothing else, encoder and decoder alike."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import AS_USERS
from kl_twin import random_params

from lwd_jax.autoencoders import kl
from lwd_jax.config import Reconstruction
from lwd_jax.objective.reconstruction import reconstruction_loss
from lwd_jax.weights.table import flat


def assert_near(ours, wanted) -> None:
    """Leaf by leaf to 1e-5 of its own length, or of a hundredth of the whole gradient."""
    whole = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(wanted)))
    for path, leaf in flat(ours).items():
        exact = flat(wanted)[path]
        assert np.linalg.norm(leaf - exact) < 1e-5 * max(np.linalg.norm(exact), 1e-2 * whole), path


def slope(loss, params, gradient) -> tuple[float, float]:
    """d loss along the gradient: (its length, central differences of the loss without any derivative)."""
    norm = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient)))
    moved = jax.jit(lambda p, g, step: loss(jax.tree.map(lambda p, g: p + step * g / norm, p, g)))
    return norm, (float(moved(params, gradient, 1e-2)) - float(moved(params, gradient, -1e-2))) / 2e-2


SIZES = dataclasses.replace(kl.VARIANTS["tiny"], block_out_channels=(8, 16))  # every kind of block, few of each
TERMS = Reconstruction(alpha=0.25, beta=0.01, lpips=0.0, scales=(2,))


def stage_1_loss(remat, side, params):
    """Encoder, the decoder at both sizes, the posterior's sample and the KL term, of one picture of side x side px."""
    module = kl.AutoencoderKL(SIZES, remat=remat)
    x = jax.random.uniform(jax.random.key(side), (1, side, side, 3), minval=-1.0)

    def method(name):
        return lambda x: module.apply({"params": params}, x, method=name)

    per_sample, _ = reconstruction_loss(method("encode"), method("decode"), x, jax.random.key(3), TERMS, None)
    return per_sample.mean()


@functools.cache
def plain_gradient(side):
    params = random_params(SIZES)
    return params, jax.jit(jax.grad(functools.partial(stage_1_loss, "none", side)))(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "side, remat",
    [(64, "full"), *(pytest.param(*case, marks=pytest.mark.heavy) for case in ((64, "attention"), (128, "full")))],
)
def test_stage_1_gradients_under_jit_at_local_batch_1(side, remat):
    """Every policy gives the gradient of no remat. (On XLA:CPU one was once seen wrong, at one size alone.)"""
    params, plain = plain_gradient(side)
    assert_near(
        jax.jit(jax.grad(functools.partial(stage_1_loss, remat, side)), compiler_options=AS_USERS)(params), plain
    )


@pytest.mark.parametrize("side", [64, pytest.param(128, marks=pytest.mark.heavy)])
def test_stage_1_gradient_is_the_slope(side):
    params, plain = plain_gradient(side)
    norm, measured = slope(functools.partial(stage_1_loss, "none", side), params, plain)
    assert abs(measured - norm) < 1e-2 * norm
