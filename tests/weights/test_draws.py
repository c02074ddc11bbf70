"""Laws: initial weights are drawn evenly and apart from each other, and are the same wherever they are drawn."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lwd_jax.config import Mesh
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.weights.draws import draws

SHAPE = (60, 40, 50)


def key_of(seed: int) -> jax.Array:
    return draws(jax.random.key(seed))


def correlations(streams: np.ndarray) -> np.ndarray:
    """Of every two rows [n values]; in units of what independent rows would have."""
    found = np.corrcoef(streams)[np.triu_indices(len(streams), 1)]
    return found * np.sqrt(streams.shape[1])


@pytest.mark.parametrize("seed", range(6))
def test_numbers_are_spread_as_they_should_be(seed):
    from scipy import stats  # a second, of the worker that runs this

    uniform = np.asarray(jax.random.uniform(key_of(seed), SHAPE))
    normal = np.asarray(jax.random.normal(key_of(seed), SHAPE))
    cut = np.asarray(jax.random.truncated_normal(key_of(seed), -2, 2, SHAPE))
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-4
    assert stats.kstest(normal.ravel(), "norm").pvalue > 1e-4
    assert stats.kstest(cut.ravel(), stats.truncnorm(-2, 2).cdf).pvalue > 1e-4


@pytest.mark.parametrize("axis", range(3))
def test_neighbours_are_independent(axis):
    x = np.moveaxis(np.asarray(jax.random.normal(key_of(1), SHAPE)), axis, 0)
    for step in (1, 2, 7):
        pairs = np.stack([x[step:].ravel(), x[:-step].ravel()])
        assert np.abs(correlations(pairs)).max() < 4.5


@pytest.mark.parametrize("make", ["fold_in", "split"])
def test_streams_of_related_keys_are_independent(make):
    count, length = 128, 1 << 14
    by = {
        "fold_in": lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count)),
        "split": lambda key: jax.random.split(key, count),
    }[make]
    streams = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (length,)))(by(key_of(2))))
    assert np.abs(correlations(streams)).max() < 5.5  # of 8128 pairs
    assert np.unique(streams[:, :2], axis=0).shape[0] == count


def test_a_million_keys_are_different():
    keys = np.asarray(jax.random.key_data(jax.random.split(key_of(3), 1_000_000)))
    assert len(np.unique(keys.view(np.uint64))) == 1_000_000


def test_every_bit_turns_with_every_bit_of_the_index():
    """Of numbers whose indices differ in one bit, each bit differs half of the time."""
    bits = np.asarray(jax.random.bits(key_of(4), (1 << 16,)))
    for place in range(16):
        turned = bits ^ bits[np.arange(1 << 16) ^ (1 << place)]
        shares = [np.mean(turned >> bit & 1) for bit in range(32)]
        assert np.abs(np.array(shares) - 0.5).max() < 0.015  # 2^15 pairs: 5 standard deviations


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16])
def test_narrow_numbers_are_the_first_bits_of_wide_ones(dtype):
    wide = np.asarray(jax.random.bits(key_of(5), (7, 9)))
    narrow = np.asarray(jax.random.bits(key_of(5), (7, 9), dtype))
    np.testing.assert_array_equal(narrow, wide >> (32 - 8 * narrow.itemsize))
    assert narrow.dtype == dtype


def test_an_index_takes_more_than_its_word():
    """Parameters of more than 2^32 numbers can be drawn; they begin anew."""
    assert jax.eval_shape(lambda: jax.random.normal(key_of(6), (3, 1 << 17, 1 << 15))).shape[0] == 3


@pytest.mark.parametrize("spec", [PartitionSpec("fsdp"), PartitionSpec(None, "tensor", "fsdp")])
def test_a_device_draws_its_own_part(spec):
    """The same numbers over a mesh; nothing moves, and nowhere is there the whole."""
    mesh = make_mesh(Mesh(1, 4, 1, 2), jax.devices()[:8])
    shape = (32, 24, 40)
    whole = jax.jit(lambda: jax.random.normal(key_of(7), shape))()
    compiled = jax.jit(
        lambda: jax.random.normal(key_of(7), shape), out_shardings=NamedSharding(mesh, spec)
    ).lower().compile()  # fmt: skip
    np.testing.assert_array_equal(compiled(), whole)
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    assert f"[{','.join(map(str, shape))}]" not in text
