"""LoRA (arXiv 2106.09685, section 4.1): W + scale a b, one of the factors zero at the start, so that training begins at
the base."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwd_jax import config as configs
from lwd_jax.nn.layers import SCALE, TRAINED
from lwd_jax.weights.table import flat


def scale(adapter: configs.Adapter) -> float:
    """alpha / r; rank-stabilised alpha / sqrt(r), under which higher ranks learn as fast (rsLoRA, arXiv 2312.03732)."""
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rank_stabilised else adapter.rank)


def start(kernel: jax.Array, key: jax.Array, adapter: configs.Adapter) -> dict[str, jax.Array]:
    """The factors before the first step.

    The one that is not zero is drawn with the standard deviation 1 / r: the first (init "gaussian"), or the second
    (init "zero"); the two train differently (arXiv 2406.08447).

    Args:
      kernel: [.., in, out]; only its shape is read.
      key: of what is drawn.
      adapter: rank, alpha, init, rank_stabilised.
    """
    *layers, width, features = kernel.shape
    shapes = ((*layers, width, adapter.rank), (*layers, adapter.rank, features))
    drawn = 0 if adapter.init == "gaussian" else 1
    pair = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    pair[drawn] = jax.random.normal(key, shapes[drawn]) / adapter.rank
    return dict(zip(TRAINED, pair)) | {SCALE: jnp.full(layers, scale(adapter), jnp.float32)}


def settings_of(factors: Any) -> configs.Adapter:
    """The config that a run with these factors would have.

    Args:
      factors: a tree of `lora_a`, `lora_b` and `lora_scale` alone, of one rank and one scale.
    """
    leaves = flat(factors)
    paths = sorted({path.rpartition("/")[0] for path in leaves})
    rank = leaves[f"{paths[0]}/{TRAINED[0]}"].shape[-1]
    one = float(np.ravel(leaves[f"{paths[0]}/{SCALE}"])[0])
    return configs.Adapter(kind="lora", rank=rank, alpha=one * rank, targets=tuple(paths))
