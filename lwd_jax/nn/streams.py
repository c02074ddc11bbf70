"""What one kind of tokens brings to a block of an MMDiT (arXiv 2403.03206, figure 2b), as SD3 and FLUX have it.

`config` is that of the backbone; read of it are width, num_attention_heads, attention_head_dim and qk_norm.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lwd_jax.nn.layers import Dense, RMSNorm, gelu
from lwd_jax.nn.modulation import Modulation


class Projections(nn.Module):
    """What one kind of tokens brings to one attention: queries, keys, values, and the way out of it."""

    config: Any
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    last: bool = False  # nothing comes out

    def dense(self, features: int) -> Dense:
        return Dense(features, dtype=self.dtype, param_dtype=self.param_dtype)

    def setup(self):
        width = self.config.width
        self.q, self.k, self.v = self.dense(width), self.dense(width), self.dense(width)
        if self.config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(param_dtype=self.param_dtype), RMSNorm(param_dtype=self.param_dtype)
        if not self.last:
            self.out = self.dense(width)

    def qkv(self, x):
        """[B L D] -> three of [B L N d]."""
        heads = (*x.shape[:2], self.config.num_attention_heads, self.config.attention_head_dim)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        return (self.q_norm(q), self.k_norm(k), v) if self.config.qk_norm else (q, k, v)

    def result(self, attended):
        """[B L N d] -> [B L D]."""
        return self.out(attended.reshape(*attended.shape[:2], -1))


class Stream(Projections):
    """All weights of one kind of tokens in a block: modulation, projections and the MLP."""

    vectors: int = 6  # of modulation

    def setup(self):
        super().setup()
        width = self.config.width
        self.modulation = Modulation(self.vectors * width, dtype=self.dtype, param_dtype=self.param_dtype)
        if not self.last:
            self.up, self.down = self.dense(4 * width), self.dense(width)

    def mlp(self, x):
        return self.down(gelu(self.up(x)))


def padded_text(text, parts: int):
    """Text tokens that divide over `parts` devices, as the pictures' do, and which of them are real.

    Returns:
      ([B L D] with padding behind, [B L] bool or None where there is no padding).
    """
    length = text.shape[1]
    missing = -length % parts
    if not missing:
        return text, None
    real = jnp.broadcast_to(jnp.arange(length + missing) < length, (text.shape[0], length + missing))
    return jnp.pad(text, ((0, 0), (0, missing), (0, 0))), real
