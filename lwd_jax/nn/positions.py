"""Position and time tables. All of them are float32 whatever the compute dtype: in bfloat16 a time embedding has an RMS
error of .24 on .71."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lwd_jax.nn.layers import precision_of
from lwd_jax.shapes import shaped

TIME_FREQUENCIES = 128


def sincos(positions: np.ndarray, width: int) -> np.ndarray:
    """[n] positions -> [n, width] float32: sin then cos of position / 10000^(2 i / width), i = 0 .. width / 2 - 1.

    Reference: Attention is all you need (arXiv 1706.03762), section 3.5, with the halves kept apart.
    """
    frequencies = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def table_positions(length: int, longest: int, size: int) -> np.ndarray:
    """Where along one axis of a position table of `size` entries the `length` tokens of a picture stand.

    While the longest side fits, the picture is the centred crop of the table, as in SD3. Beyond it, the longest side
    spans the whole table from first to last entry and the other side has the same spacing, centred: the picture keeps
    its proportions and no position is extrapolated. At longest = size both rules agree.

    Args:
      length: tokens along this axis.
      longest: tokens along the longer axis of the picture.
      size: entries of the table along each axis.

    Returns:
      [length] float64 in [0, size - 1]; whole numbers while longest <= size.
    """
    if longest <= size:
        return np.arange(length) + float((size - length) // 2)
    step = (size - 1) / (longest - 1)
    return np.arange(length) * step + (size - 1 - (length - 1) * step) / 2


def interpolate_rows(table, positions: np.ndarray):
    """Rows of `table` [size D] at fractional `positions` [n], linear between neighbours -> [n D] float32."""
    below = np.clip(np.floor(positions), 0, table.shape[0] - 1).astype(np.int32)
    above = np.minimum(below + 1, table.shape[0] - 1)
    share = (positions - below).astype(np.float32)[:, None]
    table = table.astype(jnp.float32)
    if not share.any():
        return table[below]
    return table[below] * (1 - share) + table[above] * share


@shaped("table: 2 S D -> h w _")
def grid_positions(table, height: int, width: int):
    """Embedding of a grid of height x width tokens.

    Args:
      table: [2 S D] entries along x (0) and y (1); the first D channels of a token are its column's entry, the last D
        its row's.
      height, width: in tokens.

    Returns:
      [height width 2D] float32. No gradient reaches the table: it is part of the model, not a trained weight.
    """
    table = lax.stop_gradient(table)
    longest = max(height, width)
    columns = interpolate_rows(table[0], table_positions(width, longest, table.shape[1]))
    rows = interpolate_rows(table[1], table_positions(height, longest, table.shape[1]))
    shape = (height, width, table.shape[2])
    return jnp.concatenate([jnp.broadcast_to(columns[None], shape), jnp.broadcast_to(rows[:, None], shape)], axis=-1)


@shaped("t: B -> B _")
def time_features(t):
    """[B] time in [0, 1] -> [B 256] float32: cos then sin of 1000 t / 10000^(i / 128).

    The factor 1000 makes t the timestep that SD3 and FLUX were trained with. FLUX is told its guidance scale so too,
    where angles reach 5000 and a last bit of a frequency is seen: they are rounded where PyTorch's are.
    """
    exponents = np.float32(-np.log(10000.0)) * np.arange(TIME_FREQUENCIES, dtype=np.float32)
    exponents = exponents / np.float32(TIME_FREQUENCIES)
    angles = (1000.0 * t.astype(jnp.float32))[:, None] * np.exp(exponents.astype(np.float64)).astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Rotation(NamedTuple):
    """Rotary positions (RoPE, arXiv 2104.09864): cosine and sine of every pair's angle, [1 L d/2] float32 each."""

    cos: jax.Array
    sin: jax.Array


def frequencies(width: int, theta: float) -> np.ndarray:
    """[width / 2] float64: theta^(-2 i / width), what positions are multiplied with to be angles (equation 15)."""
    return theta ** -(np.arange(0, width, 2) / width)


def grid_rotation(height: int, width: int, axes: Sequence[int], thetas: Sequence[float]) -> Rotation:
    """Rotations of a grid of height x width tokens, row by row.

    Args:
      height, width: in tokens.
      axes: how many channels of a head turn by a token's index (0 for all of a picture), its row and its column.
      thetas: of the three.

    Returns:
      Of L = height width tokens and d = sum(axes).
    """

    def table(function):
        turns = [frequencies(size, theta) for size, theta in zip(axes, thetas, strict=True)]
        places = (np.zeros(1), np.arange(height), np.arange(width))
        parts = [function(np.outer(place, turn)).astype(np.float32) for place, turn in zip(places, turns)]
        # By axis up to here: whole tables would be constants of the program, 17 MB each at 4096 px.
        shaped = (parts[0][None], parts[1][:, None], parts[2][None])
        grid = [jnp.broadcast_to(part, (height, width, part.shape[-1])) for part in shaped]
        return jnp.concatenate(grid, axis=-1).reshape(1, height * width, -1)

    return Rotation(table(np.cos), table(np.sin))


def unturned(length: int, width: int) -> Rotation:
    """The rotation of `length` tokens at position 0: none."""
    shape = (1, length, width // 2)
    return Rotation(jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def rotate(x, rotation: Rotation, scale: float = 1.0):
    """Channels 2 i and 2 i + 1 of x [B L N d] turned by the i-th angle of their token, all times `scale`.

    Float32 inside, returned in the dtype of x; no gradient reaches the tables. Reference: arXiv 2104.09864, eq. 34.
    """
    cos, sin = (scale * table[:, :, None] for table in rotation)
    return _turned(x, jnp.repeat(cos, 2, axis=-1), jnp.stack([-sin, sin], axis=-1).reshape(*sin.shape[:-1], -1))


@jax.custom_vjp
def _turned(x, cos, sin):
    """x cos + (x with the channels of every pair exchanged) sin; the tables are [1 L 1 d].

    The exchange is a product with a permutation: exact, and at home on a matrix unit. Pairs on an axis of their own
    would take a TPU, which pads the last axis to 128, a fifth of a GiB of float32 in a block of FLUX at 1024 px.
    """
    size = x.shape[-1]
    exchange = jnp.asarray(np.eye(size)[np.arange(size) ^ 1], x.dtype)
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    precision = precision_of(x.dtype)
    partner = lax.dot_general(x, exchange, axes, precision=precision, preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + partner * sin).astype(x.dtype)


def _turned_forward(x, cos, sin):
    return _turned(x, cos, sin), (cos, sin)


def _turned_backward(tables, gradient):
    cos, sin = tables
    return _turned(gradient, cos, -sin), None, None  # by the opposite angles


_turned.defvjp(_turned_forward, _turned_backward)
