"""Minor-component adapters (URAE, arXiv 2503.16322): what trains are the r smallest singular components of
a kernel, which carry the least of what the model knows.

With the components W = .. + u s v, what trains are a = u sqrt(s) and b = sqrt(s) v. The paper subtracts their product
from W once; in bfloat16 that would be lost, since the smallest components lie below W's last bit. Here W stays as it is
and the product at the start is a fixed pair of the opposite sign: the start is W exactly, and the base remains the
checkpoint's, bit for bit.
"""

import jax
import jax.numpy as jnp

from lwd_jax import config as configs
from lwd_jax.nn.layers import FIXED, SCALE, TRAINED


def smallest(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(a [in, r], b [r, out]) of a matrix [in, out]: the factors of its r smallest singular components."""
    u, values, v = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(values[-rank:])
    return u[:, -rank:] * root, root[:, None] * v[-rank:]


def start(kernel: jax.Array, key: jax.Array, adapter: configs.Adapter) -> dict[str, jax.Array]:
    """The factors before the first step, those that train and those that take them off again.

    Args:
      kernel: [.., in, out].
      key: not used; nothing is drawn.
      adapter: of which the rank is read.
    """
    layers = kernel.shape[:-2]
    matrices = kernel.astype(jnp.float32).reshape(-1, *kernel.shape[-2:])
    # One layer at a time: a decomposition takes several times the memory of its matrix.
    a, b = jax.lax.map(lambda matrix: smallest(matrix, adapter.rank), matrices)
    a, b = (factor.reshape(*layers, *factor.shape[1:]) for factor in (a, b))
    return dict(zip((*TRAINED, *FIXED), (a, b, -a, b))) | {SCALE: jnp.ones(layers, jnp.float32)}
