"""What a backbone is told besides the noisy latent and the time."""

from typing import Any, NamedTuple

import jax
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
