"""Adaptive layer norm (DiT, arXiv 2212.09748, section 3.2): shift, scale and gate computed from time and pooled text.

These are float32 islands: the products may take bfloat16 operands, their results and all that follows up to the cast
back into the residual stream are float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.nn.layers import NORMAL, ZEROS, Dense, layer_norm
from lwd_jax.shapes import shaped

EMBEDDERS = ("time/", "guidance/", "pooled/")  # the Embedders of backbones


@shaped("x: B L D, shift: B D, scale: B D -> B L D")
@functools.partial(jax.checkpoint, prevent_cse=False)
def modulate(x, shift, scale):
    """layer_norm(x) (1 + scale) + shift, float32. Reference: DiT, adaLN."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


@shaped("x: B L D, gate: B D, y: B L D -> B L D")
@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(x, gate, y):
    """x + gate y, summed in float32, returned in the dtype of x."""
    return (x.astype(jnp.float32) + gate[:, None] * y.astype(jnp.float32)).astype(x.dtype)


class Modulation(Dense):
    """emb [B D] float32 -> `features / D` vectors of [B D] float32, zero at the start of training (adaLN-Zero)."""

    out_dtype: jnp.dtype | None = jnp.float32
    kernel_init: object = ZEROS

    def __call__(self, emb):
        return jnp.split(super().__call__(jax.nn.silu(emb)), self.features // emb.shape[-1], axis=-1)


class Embedder(nn.Module):
    """down(silu(up(x))), the vector every modulation is computed from; a float32 island."""

    width: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        hidden = Dense(self.width, param_dtype=self.param_dtype, kernel_init=NORMAL, name="up")(x)
        return Dense(self.width, param_dtype=self.param_dtype, kernel_init=NORMAL, name="down")(jax.nn.silu(hidden))
