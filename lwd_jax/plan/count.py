"""Floating-point operations of a traced program: the products and convolutions of its jaxpr without dead code.

Loops are multiplied, and so are the grids of Pallas kernels, which XLA's cost analysis does not see, nor cuDNN's
attention; what remat computes again is there as often as it is computed. Everything else (norms, softmax, optimizer)
is not counted.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval


class Operations(NamedTuple):
    """FLOPs of the whole program on all devices.

    Attributes:
      plain: of products and convolutions.
      kernels: of those inside Pallas kernels and cuDNN's attention.
    """

    plain: float = 0.0
    kernels: float = 0.0

    @property
    def total(self) -> float:
        return self.plain + self.kernels

    def times(self, factor: float) -> "Operations":
        return Operations(self.plain * factor, self.kernels * factor)

    def plus(self, other: "Operations") -> "Operations":
        return Operations(self.plain + other.plain, self.kernels + other.kernels)


def _product(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    sides = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(sides[axis] for axis in contracted)


def _convolution(equation) -> float:
    """2 x results x products of each; the zeros that a transposed convolution puts between its inputs are no work."""
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    each = math.prod(kernel) / kernel[numbers.rhs_spec[0]] / math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * each


def _cudnn(products: int) -> Callable:
    """So many products of cuDNN's attention: q, k and v are [B T N d] and [B S N d]."""

    def count(equation) -> float:
        query, key = (value.aval.shape for value in equation.invars[:2])
        return products * 2.0 * math.prod(query) * key[1]

    return count


_COUNTED = {"dot_general": _product, "conv_general_dilated": _convolution}
_KERNELS = {  # q k^T and p v; and those of dq, dk, dv and the softmax's gradient, with q k^T once more
    "dot_product_attention_fwd_wrapper": _cudnn(2),
    "dot_product_attention_bwd_wrapper": _cudnn(5),
}


def _jaxprs(parameters: Any) -> Iterator:
    for value in parameters if isinstance(parameters, (list, tuple)) else [parameters]:
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
        elif isinstance(value, (list, tuple)):
            yield from _jaxprs(value)


def _inside(equation) -> Operations:
    """Of the jaxprs that an equation holds. One branch of a conditional runs: the largest is counted. Of a `while`
    whose end is not known the body is counted once.
    """
    name, parameters = equation.primitive.name, equation.params
    found = [_operations(jaxpr) for value in parameters.values() for jaxpr in _jaxprs(value)]
    if not found:
        return Operations()
    if name == "cond":
        return max(found, key=lambda each: each.total)
    total = Operations()
    for each in found:
        total = total.plus(each)
    if name == "scan":
        return total.times(parameters["length"])
    if name == "shard_map":  # its shapes are those of one device
        mesh, axes = parameters["mesh"], parameters.get("newly_manual_axes", parameters.get("manual_axes"))
        return total.times(math.prod(mesh.shape[axis] for axis in axes))
    if name == "pallas_call":
        grid = math.prod(side for side in parameters["grid_mapping"].grid if isinstance(side, int))
        return Operations(kernels=total.total * grid)
    return total


def _operations(jaxpr) -> Operations:
    total = Operations()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in _COUNTED:
            found = Operations(plain=_COUNTED[name](equation))
        elif name in _KERNELS:
            found = Operations(kernels=_KERNELS[name](equation))
        else:
            found = _inside(equation)
        total = total.plus(found)
    return total


def operations(function: Callable, *args) -> Operations:
    """Of `function(*args)`; the arguments may be ShapeDtypeStructs."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return operations_of(jaxpr, [True] * len(jaxpr.outvars))


def operations_of(jaxpr, wanted: list[bool]) -> Operations:
    """Of what a jaxpr computes for those of its outputs that are wanted."""
    return _operations(partial_eval.dce_jaxpr(jaxpr, wanted)[0])
