"""Floating-point operations by formula. A product of [m k] and [k n] is 2 m n k; what is not a product is not counted.

`compiled.cost_analysis()` counts the body of a scan once and does not see fused kernels, so utilisation is stated
against these.
"""

from typing import Any

from lwd_jax.backbones import flux, sd3
from lwd_jax.nn.positions import TIME_FREQUENCIES

TRAINING = 3  # one forward and, for the gradients by inputs and by weights, two more; what remat repeats is not counted


def sd3_forward(config: sd3.Config, height: int, width: int, text: int) -> int:
    """FLOPs of the SD3 backbone for one picture.

    Args:
      config: sizes.
      height, width: of the latent.
      text: text tokens.
    """
    wide, patch = config.width, config.patch_size
    picture = height * width // patch**2
    square = 2 * wide * wide
    both = picture + text

    streams = both * (4 + 8) * square  # q k v out, and the MLP up and down at four times the width
    attention = 4 * both * both * wide
    joint = streams + attention + (6 + 6) * square
    dual = picture * 4 * square + 4 * picture * picture * wide + 3 * square
    # The last block's text has no way out: keys, values and two vectors of modulation are all.
    last = (12 * picture + 2 * text) * square + 4 * picture * both * wide + (6 + 2) * square

    ends = 2 * picture * patch**2 * wide * (config.in_channels + config.out_channels)
    ends += 2 * text * config.joint_attention_dim * wide
    ends += 2 * wide * (2 * TIME_FREQUENCIES + config.pooled_projection_dim + 2 * wide)  # time and pooled embedders
    ends += 2 * square  # the last modulation
    return (config.num_layers - 1) * joint + config.dual_layers * dual + last + ends


def flux_forward(config: flux.Config, height: int, width: int, text: int) -> int:
    """FLOPs of the FLUX backbone for one picture. Arguments as of `sd3_forward`."""
    wide, patch = config.width, config.patch_size
    picture = height * width // patch**2
    square = 2 * wide * wide
    both = picture + text

    attention = 4 * both * both * wide
    double = both * (4 + 8) * square + attention + (6 + 6) * square
    # Queries, keys, values and the MLP's way up; the way out of both is five times as wide as long.
    single = both * (3 + 4 + 5) * square + attention + 3 * square

    ends = 2 * picture * patch**2 * wide * 2 * config.in_channels
    ends += 2 * text * config.joint_attention_dim * wide
    embedders = 2 if config.guidance_embeds else 1  # of time and guidance
    ends += 2 * wide * (embedders * (2 * TIME_FREQUENCIES + wide) + config.pooled_projection_dim + wide)
    ends += 2 * square  # the last modulation
    return config.num_layers * double + config.num_single_layers * single + ends


_FORWARD = {sd3.Config: sd3_forward, flux.Config: flux_forward}


def backbone_forward(config: Any, height: int, width: int, text: int) -> int:
    """FLOPs of a backbone for one picture: `sd3_forward` or its like, by the type of its Config."""
    return _FORWARD[type(config)](config, height, width, text)
