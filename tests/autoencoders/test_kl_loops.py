"""Equal blocks of the autoencoder are one loop where their inside is made again; nothing else changes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kl_twin import random_params

from lwd_jax.autoencoders.kl import AutoencoderKL, Config
from lwd_jax.nn.platform import for_platform

CONFIGS = {
    "three levels": Config(4, (8, 16, 16), norm_num_groups=4),
    "one block a level": Config(4, (8, 16), layers_per_block=1, norm_num_groups=4),
    "one level": Config(4, (8,), norm_num_groups=8, use_quant_conv=True, use_post_quant_conv=True),
}
# Blocks that are compiled: (encoder and decoder) as written, and with runs of equal ones as one.
BLOCKS = {"three levels": ((8, 11), (5, 5)), "one block a level": ((4, 6), (4, 4)), "one level": ((4, 5), (2, 2))}


def gradient(module, params, x, platform):
    """(value and gradients, the traced program)."""

    def loss(params, x):
        return jnp.square(module.apply({"params": params}, x) - x).mean()

    with for_platform(platform):
        traced = jax.make_jaxpr(module.apply)({"params": params}, x)
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x), str(traced)


OFTEN = [("full", "one block a level"), ("attention", "one level")]


@pytest.mark.parametrize(
    ("remat", "name"),
    [
        pytest.param(remat, name, marks=[] if (remat, name) in OFTEN else pytest.mark.heavy)
        for remat in ("attention", "full")
        for name in CONFIGS
    ],
)
def test_a_loop_computes_the_same(name, remat):
    module = AutoencoderKL(CONFIGS[name], remat=remat)
    x = np.random.default_rng(4).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    params = random_params(CONFIGS[name], 6)
    (expected, written), (made, looped) = (gradient(module, params, x, platform) for platform in ("cpu", "gpu"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), made, expected)
    # A block has two norms, the attention and the head one each: two halves.
    counts = [2 * sum(blocks) + 4 for blocks in BLOCKS[name]]
    assert [text.count("name=group_affine") for text in (written, looped)] == counts


@pytest.mark.parametrize(("remat", "name"), OFTEN)
def test_what_is_initialised_is_no_loop(remat, name):
    """So the parameters are the same, and under the same names."""
    module, x = AutoencoderKL(CONFIGS[name], remat=remat), jnp.zeros((1, 8, 8, 3))
    made = {}
    for platform in ("cpu", "gpu"):
        with for_platform(platform):
            made[platform] = re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(module.init)(jax.random.key(0), x)))
    assert made["cpu"] == made["gpu"]


def test_without_remat_nothing_is_a_loop():
    module = AutoencoderKL(CONFIGS["three levels"])
    x = jnp.zeros((1, 8, 8, 3))
    with for_platform("gpu"):
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        assert str(jax.make_jaxpr(module.apply)(params, x)).count("name=group_affine") == 2 * (8 + 11) + 4
