"""Dropout of what the trained factors of an adapter see, during training alone (LoRA's own; PEFT's lora_dropout)."""

import contextlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.nn.layers import Dense

_STREAM = "dropout"


def streams(rate: float) -> dict[str, jax.Array]:
    """`rngs` of the module's apply under `dropout`; one constant key, from which every layer makes its own number."""
    return {_STREAM: jax.random.key(0)} if rate else {}


def dropout(rate: float, keys: jax.Array) -> contextlib.AbstractContextManager:
    """Around a module's apply: adapters see x with each element zero with probability `rate`, else x / (1 - rate).

    What is dropped of a picture depends on its own key and on the layer, not on what else is in the batch; nor on the
    mesh, but for FLUX's single stream over `context`: there the tokens of text and picture come in the order of their
    devices (nn.sharding), and the same numbers fall on others of them.

    Args:
      rate: in [0, 1); 0 = no dropout, and nothing changes.
      keys: [B], one per picture.
    """
    if not rate:
        return contextlib.nullcontext()

    def drop(layer: Dense, x: jax.Array) -> jax.Array:
        number = jax.random.bits(layer.make_rng(_STREAM), dtype=jnp.uint32)

        def kept(key):
            return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[1:])

        return jnp.where(jax.vmap(kept)(keys), x / (1 - rate), 0).astype(x.dtype)

    def interceptor(call, arguments, keywords, context):
        if isinstance(context.module, Dense) and context.method_name == "dropped":
            return drop(context.module, *arguments, **keywords)
        return call(*arguments, **keywords)

    return nn.intercept_methods(interceptor)
