"""Supervision masks: which positions of a latent are supervised at a time t (M_t in arXiv 2506.00433)."""

from functools import partial

import jax
import jax.numpy as jnp

from lwd_jax.errors import UserError, choose
from lwd_jax.shapes import Array, shaped


def time(saliency: Array, t: Array, floor: float, softness: float) -> Array:
    """The paper's mask: 1 where saliency + floor >= t, else 0. Up to t = floor it supervises everything."""
    del softness
    return (saliency + floor >= t).astype(jnp.float32)


def everywhere(saliency: Array, t: Array, floor: float, softness: float) -> Array:
    """The baseline: ones."""
    del t, floor, softness
    return jnp.ones_like(saliency)


def soft(saliency: Array, t: Array, floor: float, softness: float) -> Array:
    """`time` with a smooth step (3 x^2 - 2 x^3) instead of the hard one.

    It is 1 where `time` is 1, falls over a width of `softness` in t, and is 0 beyond: saliency + floor <= t - softness.
    So it too supervises everything up to t = floor, and tends to `time` as `softness` tends to 0.
    """
    if not softness > 0:
        raise UserError(f"The softness of a soft mask must be positive, but it is {softness}.")
    x = jnp.clip((saliency + floor - t) / softness + 1, 0, 1)
    return x * x * (3 - 2 * x)


MASKS = {"time": time, "everywhere": everywhere, "soft": soft}


@partial(jax.jit, static_argnames=("floor", "rule", "softness"), inline=True)
@shaped("saliency: B h w 1, t: B -> B h w 1")
def supervision_mask(
    saliency: Array, t: Array, floor: float = 0.3, rule: str = "time", softness: float = 0.05
) -> Array:
    """The supervision mask of a batch: M_t in arXiv 2506.00433, with times in [0, 1].

    Args:
      saliency: [B h w 1] in [0, 1].
      t: [B] in [0, 1]; 1 = noise.
      floor: lower bound l in (0, 1): up to t = floor every position is supervised. 0.3 throughout the paper.
      rule: "time" (the paper), "everywhere" (the baseline, ones) or "soft".
      softness: width in t of the soft rule's step.

    Returns:
      [B h w 1] float32 in [0, 1]; never grows with t.

    Raises:
      UserError: an unknown rule, or a softness that is not positive.
    """
    saliency = jnp.asarray(saliency, jnp.float32)
    t = jnp.asarray(t, jnp.float32)[:, None, None, None]
    return choose(MASKS, rule, "mask rule")(saliency, t, floor, softness)
