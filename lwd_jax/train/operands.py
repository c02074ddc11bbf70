"""What stands beside a kernel so that its gradient has the precision of the products (see `nn.layers.OPERAND`)."""

import re
from typing import Any

import jax.numpy as jnp

from lwd_jax.nn.layers import OPERAND
from lwd_jax.nn.modulation import EMBEDDERS
from lwd_jax.weights.table import flat, nested


def operands(params: Any, dtype) -> Any:
    """`params` of a backbone, with an operand in `dtype` in place of every kernel that products take so: all but the
    Embedders'.

    The gradient with respect to it is in `dtype`, the precision that it is computed in: a float32 one, with respect to
    the kernel, would be the same numbers in twice the memory.
    """
    if dtype == jnp.float32:
        return params

    def operand(path, leaf):
        if not path.endswith("/kernel") or path.startswith(EMBEDDERS):
            return path, leaf
        return path.removesuffix("kernel") + OPERAND, leaf.astype(dtype)

    return nested(dict(operand(path, leaf) for path, leaf in flat(params).items()))


def of_masters(gradients: Any) -> Any:
    """Gradients by operands, under the names of the kernels that they stand for."""
    return nested({re.sub(f"/{OPERAND}$", "/kernel", path): leaf for path, leaf in flat(gradients).items()})
