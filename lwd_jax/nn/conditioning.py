"""What a backbone is told besides the noisy latent and the time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Conditioning(NamedTuple):
    """A pytree. Fields a backbone does not use are None.

    Attributes:
      tokens: [B L D] text states.
      mask: [B L], 1 where a token is real; None = all are.
      pooled: [B P] pooled text vector.
      guidance: [B] guidance scale, for guidance-distilled backbones.
    """

    tokens: jax.Array
    mask: jax.Array | None = None
    pooled: jax.Array | None = None
    guidance: jax.Array | None = None


def told(cond: Conditioning, sizes: Any, guidance: float) -> Conditioning:
    """`cond` with the guidance scale for backbones that are told one (`sizes.guidance_embeds`), else as it is."""
    if not sizes.guidance_embeds:
        return cond
    return cond._replace(guidance=np.full(len(cond.tokens), guidance, np.float32))


def inputs(sizes: Any, resolution: int, batch: int) -> tuple:
    """(z_t, t, cond) of the backbone of this Config for square pictures of `resolution` px, as ShapeDtypeStructs."""

    def array(*shape):
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    side = resolution // sizes.latent_factor
    cond = Conditioning(
        array(sizes.text_tokens, sizes.joint_attention_dim),
        pooled=array(sizes.pooled_projection_dim),
        guidance=array() if sizes.guidance_embeds else None,
    )
    return array(side, side, sizes.in_channels), array(), cond
