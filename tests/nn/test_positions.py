"""Laws of the position and time tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.nn.positions import (
    Rotation,
    grid_positions,
    interpolate_rows,
    rotate,
    sincos,
    table_positions,
    time_features,
)


def test_sincos_is_its_formula():
    positions = np.array([0.0, 0.5, 3.0, 191.0])
    made = sincos(positions, 8)
    for row, position in zip(made, positions):
        angles = [position / 10000 ** (2 * i / 8) for i in range(4)]
        np.testing.assert_allclose(row, [*np.sin(angles), *np.cos(angles)], atol=1e-6)


@pytest.mark.parametrize(("length", "start"), [(10, 0), (4, 3), (5, 2), (1, 4)])
def test_a_picture_within_the_table_is_its_centred_crop(length, start):
    np.testing.assert_array_equal(table_positions(length, length, 10), start + np.arange(length))


def test_beyond_the_table_the_longest_side_spans_it_and_proportions_stay():
    size, longest, other = 12, 20, 7
    along, across = table_positions(longest, longest, size), table_positions(other, longest, size)
    np.testing.assert_allclose(along[[0, -1]], [0, size - 1], atol=1e-12)
    np.testing.assert_allclose(np.diff(along), (size - 1) / (longest - 1))
    np.testing.assert_allclose(np.diff(across), (size - 1) / (longest - 1))
    np.testing.assert_allclose(across.mean(), (size - 1) / 2)


def test_the_rules_agree_where_they_meet():
    size = 192
    inside, beyond = table_positions(size, size, size), table_positions(size + 1, size + 1, size)
    assert np.abs(beyond[:-1] - inside).max() <= 1.0  # one more token moves none by more than one entry
    np.testing.assert_array_equal(inside, np.arange(size))


@pytest.mark.parametrize(("height", "width"), [(9, 5), (6, 6), (3, 11), (2, 4)])
def test_grid_is_numpys_interpolation_of_each_channel(height, width):
    """Oracle: numpy.interp along each axis, on a table of random numbers."""
    size, half = 6, 3
    table = np.random.default_rng(0).standard_normal((2, size, half)).astype(np.float32)
    made = np.asarray(jax.jit(grid_positions, static_argnums=(1, 2))(table, height, width))
    longest = max(height, width)
    step = 1.0 if longest <= size else (size - 1) / (longest - 1)

    def expected(entries, length):
        start = (size - length) // 2 if longest <= size else (size - 1 - (length - 1) * step) / 2
        where = start + step * np.arange(length)
        return np.stack([np.interp(where, np.arange(size), channel) for channel in entries.T], axis=-1)

    columns, rows = expected(table[0], width), expected(table[1], height)
    assert made.shape == (height, width, 2 * half) and made.dtype == np.float32
    np.testing.assert_allclose(made[..., :half], np.broadcast_to(columns[None], (height, width, half)), atol=1e-6)
    np.testing.assert_allclose(made[..., half:], np.broadcast_to(rows[:, None], (height, width, half)), atol=1e-6)


def test_extended_sines_stay_near_the_formula():
    """4096 px on SD3's table (192 entries, 3 to a unit): linear interpolation is within step^2 / 8 of the sines."""
    width, size = 64, 192
    table = sincos(np.arange(size) / 3, width)
    where = table_positions(256, 256, size)
    apart = np.abs(np.asarray(interpolate_rows(table, where)) - sincos(where / 3, width)).max()
    assert 1e-3 < apart <= (1 / 3) ** 2 / 8 + 1e-6


def test_no_gradient_reaches_the_table():
    table = np.ones((2, 6, 4), np.float32)
    assert not np.any(np.asarray(jax.jit(jax.grad(lambda table: grid_positions(table, 9, 3).sum()))(table)))


def test_time_features_equal_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.random.default_rng(1).uniform(size=64).astype(np.float32)
    expected = get_timestep_embedding(torch.from_numpy(1000 * t), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(jax.jit(time_features)(t), expected.numpy(), atol=2e-4)


def test_time_features_are_float32_whatever_they_are_given():
    assert jax.eval_shape(time_features, np.array([0.3], jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_turn_as_complex_numbers(dtype):
    """And so do gradients, by the opposite angle: in float32 inside, rounded once."""
    random = np.random.default_rng(0)
    x, g = (random.normal(size=(2, 5, 3, 8)).astype(dtype) for _ in range(2))
    angles = random.uniform(-9, 9, size=(1, 5, 4))
    rotation = Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))

    @jax.jit
    def there_and_back(x, g):
        made, pull = jax.vjp(lambda x: rotate(x, rotation, 1.3), x)
        return made, pull(g)[0]

    turn = 1.3 * np.exp(1j * angles)[:, :, None]
    for given, found, by in zip((x, g), there_and_back(x, g), (turn, turn.conj())):
        pairs = np.asarray(given, np.float64)
        pairs = (pairs[..., ::2] + 1j * pairs[..., 1::2]) * by
        expected = np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=jnp.finfo(dtype).eps, atol=1e-6)
