"""Invertible layouts: how the axes of one foreign (PyTorch) tensor become those of our parameter, and back."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A pair of inverse functions on one array. They move elements about and never change a value."""

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_foreign: Callable[[np.ndarray], np.ndarray]


def _permuted(name: str, *axes: int) -> Layout:
    back = tuple(np.argsort(axes))
    return Layout(name, lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back))


SAME = Layout("same", lambda x: x, lambda x: x)
LINEAR = _permuted("linear: (out, in) -> (in, out)", 1, 0)
CONV = _permuted("convolution: (out, in, height, width) -> (height, width, in, out)", 2, 3, 1, 0)


def conv_as_linear(height: int, width: int) -> Layout:
    """A convolution whose stride is its kernel, as a linear layer on patches flattened as (row, column, channel).

    (out, in, height, width) -> (height width in, out).
    """

    def to_ours(x):
        return CONV.to_ours(x).reshape(-1, x.shape[0])

    def to_foreign(x):
        return CONV.to_foreign(x.reshape(height, width, -1, x.shape[-1]))

    return Layout(f"{height}x{width} convolution as linear: (out, in, h, w) -> (h w in, out)", to_ours, to_foreign)


def foreign_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the foreign tensor that `layout` makes of a parameter of this shape.

    The layout is tried on zeros that have no memory of their own: nothing of that size is allocated, unless the layout
    joins arrays, as that of a position table does (a byte an element).
    """
    return layout.to_foreign(np.broadcast_to(np.zeros((), np.int8), shape)).shape
