"""Laws: blockwise attention is dense attention, gradients included, and its memory grows linearly with positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.autoencoders.blockwise import blockwise_attention
from lwd_jax.autoencoders.kl import VARIANTS, AutoencoderKL
from lwd_jax.nn.attention import for_platform


def dense(q, k, v):
    scores = jnp.einsum("bqd,bkd->bqk", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, axis=-1), v)


def random(batch, positions, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(positions), 4)
    return [3.0 * jax.random.normal(key, (batch, positions, width), dtype) for key in keys]


@pytest.mark.parametrize(
    "positions, keys, block", [(1, 1, 128), (77, 77, 128), (256, 256, 128), (1025, 1025, 512), (130, 520, 256)]
)
def test_equals_dense_attention(positions, keys, block):
    """Blocks that divide the positions and blocks that do not; one block, and several; a share of the queries."""
    q, _, _, weight = random(2, positions, 24)
    _, k, v, _ = random(2, keys, 24)

    def both(attend):
        def loss(q, k, v):
            output = attend(q, k, v)
            return jnp.sum(output * weight), output

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    gradients, output = both(lambda *qkv: blockwise_attention(*qkv, block))
    wanted_gradients, wanted = both(dense)
    for ours, theirs in zip((output, *gradients), (wanted, *wanted_gradients)):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs) + 1e-6


def test_large_scores_do_not_overflow():
    q, k, v, _ = random(1, 200, 8)
    output = blockwise_attention(1e3 * q, 1e3 * k, v, 128)
    assert np.isfinite(output).all()


def test_bfloat16_accumulates_in_float32():
    q, k, v, _ = random(1, 2000, 16, jnp.bfloat16)
    output = blockwise_attention(q, k, v, 512)
    wanted = dense(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert output.dtype == jnp.bfloat16
    assert np.linalg.norm(output.astype(jnp.float32) - wanted) < 5e-3 * np.linalg.norm(wanted)


def test_memory_grows_linearly():
    """By the compiled programs, forward and gradient: at 32,768 positions 4 GiB of scores would be needed."""

    def temporaries(positions):
        args = [jax.ShapeDtypeStruct((1, positions, 64), jnp.float32)] * 3
        step = jax.jit(jax.grad(lambda *qkv: blockwise_attention(*qkv).sum(), (0, 1, 2)))
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(16_384), temporaries(32_768)
    assert large < 2.1 * small and large < 256 * 2**20


@pytest.mark.parametrize("platform, kernel", [("tpu", "splash"), ("gpu", ""), ("cpu", "")])
def test_a_tpu_has_a_kernel_for_it(platform, kernel):
    """In the autoencoder itself; elsewhere the blocks are a loop of products. (cuDNN's kernels take narrower heads.)"""
    module = AutoencoderKL(VARIANTS["tiny"])
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    with for_platform(platform):
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        shown = str(jax.make_jaxpr(lambda params, x: module.apply(params, x, method="encode").mean)(params, x))
    assert ("splash" in shown) is bool(kernel) and ("fused_attention" in shown) is False
