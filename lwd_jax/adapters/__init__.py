"""Low-rank adapters over a frozen backbone: one file a kind, one line each in the table.

They are leaves beside the kernels of the parameter tree (see `factors`), so that they know no model: whatever has
kernels in the shared path vocabulary can be adapted, and whatever takes a parameter tree takes an adapted one.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lwd_jax import config as configs
from lwd_jax.adapters import lora, minor_components
from lwd_jax.adapters.factors import check_rank, joined, pairs_beside, product, targeted
from lwd_jax.nn.layers import FIXED
from lwd_jax.weights.table import flat, nested

KINDS = {"lora": lora.start, "minor_components": minor_components.start}


def attach(params: Any, key: jax.Array, adapter: configs.Adapter) -> Any:
    """The tree with the factors of a new adapter beside the kernels that it targets; pure.

    Args:
      params: of the base, in which fixed factors of earlier adapters may stand (`factors.frozen`), but none that train.
      key: what is drawn for a kernel depends on it and on the kernel's path.
      adapter: kind (not "none"), rank, targets and the rest.

    Raises:
      UserError: a target that names no layer, or a rank that one of the layers does not have.
    """
    leaves = flat(params)
    added: dict[str, Any] = {}
    for path in targeted(leaves, adapter.targets):
        kernel, before = leaves[f"{path}/kernel"], pairs_beside(leaves, path)
        check_rank(path, kernel.shape, adapter.rank)
        if before:
            kernel = kernel.astype(jnp.float32) + product(*joined(before))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        made = KINDS[adapter.kind](kernel, own, adapter)
        if before and FIXED[0] in made:
            before = [tuple(made[name] for name in FIXED), *before]
        if before:
            made |= zip(FIXED, joined(before))
        added |= {f"{path}/{name}": leaf for name, leaf in made.items()}
    return nested(leaves | added)
