"""Laws: blockwise attention is dense attention, gradients included, and its memory grows linearly with positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from lwd_jax.nn.blockwise import _attend, blockwise_attention


def dense(q, k, v, real=None):
    mask = None if real is None else real[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def blockwise(q, k, v, real=None, block=0):
    return blockwise_attention(q, k, v, real, name="attention", block=block)


def random(batch, positions, heads, width, dtype=np.float32):
    drawn = np.random.default_rng(positions).standard_normal((4, batch, positions, heads, width))
    return list((3 * drawn).astype(dtype))


@pytest.mark.parametrize("heads, masked", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(
    "positions, keys, block", [(1, 1, 128), (77, 77, 128), (256, 256, 128), (1025, 1025, 512), (130, 520, 256)]
)
def test_equals_dense_attention(positions, keys, block, heads, masked):
    """Blocks that divide the positions and blocks that do not; one block, and several; a share of the queries; keys
    left out, of one picture those of the whole first block.
    """
    q, _, _, weight = random(2, positions, heads, 24)
    _, k, v, _ = random(2, keys, heads, 24)
    places = np.arange(keys)
    real = np.stack([places >= min(keys - 1, block + 3), places < keys - keys // 4]) if masked else None

    def both(attend):
        def loss(q, k, v):
            output = attend(q, k, v, real)
            return jnp.sum(output * weight), output

        with jax.default_matmul_precision("highest"):
            return jax.device_get(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v))

    gradients, output = both(lambda *given: blockwise(*given, block=block))
    wanted_gradients, wanted = both(dense)
    for ours, theirs in zip((output, *gradients), (wanted, *wanted_gradients)):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs) + 1e-6


def test_large_scores_do_not_overflow():
    q, k, v, _ = random(1, 200, 2, 8)
    assert np.isfinite(jax.jit(functools.partial(blockwise, block=128))(1000 * q, 1000 * k, v)).all()


def test_no_key_at_all_is_no_nan():
    """A picture without a real key: what comes of it means nothing, but it is finite, and so are the gradients."""
    q, k, v, _ = random(2, 200, 2, 8)
    real = np.stack([np.zeros(200, bool), np.ones(200, bool)])
    gradients = jax.jit(jax.grad(lambda *qkv: blockwise(*qkv, real, block=128).sum(), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype):
    q, k, v, _ = random(1, 2000, 2, 16, dtype)
    output = jax.jit(functools.partial(blockwise, block=512))(q, k, v)
    wanted = np.asarray(jax.jit(dense)(*(x.astype(np.float32) for x in (q, k, v))))
    assert output.dtype == dtype
    assert np.linalg.norm(np.asarray(output, np.float32) - wanted) < 5e-3 * np.linalg.norm(wanted)


def test_weights_are_summed_in_float32():
    """By the log-sum-exp of 4,095 equal scores and another one: the weights of the equal ones, rounded to bfloat16,
    would all be off by the same. Compiled without XLA's licence to leave roundings out, which would hide them.
    """
    q, k, v, _ = (x.swapaxes(1, 2) for x in random(1, 4096, 1, 16, jnp.bfloat16))
    q, k[:, :, 1:] = q[:, :, :64], 0
    attend = jax.jit(lambda q, k, v: _attend(q, (k[None], v[None], None))).lower(q, k, v)
    logsum = attend.compile({"xla_allow_excess_precision": False})(q, k, v)[1]
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3) / 4
    np.testing.assert_allclose(logsum, logsumexp(scores, axis=-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 8])
def test_memory_grows_linearly(heads):
    """By the compiled programs, forward and gradient: at 32,768 positions 4 GiB of scores a head would be needed."""

    def temporaries(positions):
        args = [jax.ShapeDtypeStruct((1, positions, heads, 64), jnp.float32)] * 3
        step = jax.jit(jax.grad(lambda *qkv: blockwise(*qkv).sum(), (0, 1, 2)))
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(16_384), temporaries(32_768)
    operand = 32_768 * heads * 64 * 4
    assert large < 2.1 * small and large < 128 * 2**20 + 12 * operand
