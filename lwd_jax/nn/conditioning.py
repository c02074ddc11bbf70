"""What a backbone is told besides the noisy latent and the time."""

from typing import NamedTuple

import jax


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
