"""The flow-matching path: noising, its target, and how times are drawn, weighted and shifted.

t is the noise level: 0 = data, 1 = noise. Formulas are of "Scaling Rectified Flow Transformers" (SD3, arXiv
2403.03206, section 3.1 for the samplers and 5.3.2 for the shift) unless said otherwise.
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp

from lwd_jax.config import Matching
from lwd_jax.errors import UserError
from lwd_jax.shapes import Array, shaped

log = logging.getLogger(__name__)


@shaped("z0: B h w C, noise: B h w C, t: B -> B h w C")
def noised(z0: Array, noise: Array, t: Array) -> Array:
    """z_t = (1 - t) z0 + t noise, [B h w C]; t [B]."""
    t = t[:, None, None, None]
    return (1 - t) * z0 + t * noise


def velocity(z0: Array, noise: Array) -> Array:
    """dz_t / dt = noise - z0: what the backbone predicts, [B h w C]."""
    return noise - z0


def uniform(key: Array, n: int, config: Matching) -> Array:
    del config
    return jax.random.uniform(key, (n,))


def logit_normal(key: Array, n: int, config: Matching) -> Array:
    """t = sigmoid(m + s normal): m > 0 leans towards noise, m < 0 towards data."""
    return jax.nn.sigmoid(config.logit_mean + config.logit_std * jax.random.normal(key, (n,)))


def mode(key: Array, n: int, config: Matching) -> Array:
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u), u uniform: s > 0 leans towards the middle.

    Raises:
      UserError: s outside [-1, 2 / (pi - 2)], where the map of u is no longer monotone.
    """
    scale, limit = config.mode_scale, 2 / (math.pi - 2)
    if not -1 <= scale <= limit:
        raise UserError(f"Config field 'matching.mode_scale' must lie in [-1, {limit:.4f}], but it is {scale}.")
    u = jax.random.uniform(key, (n,))
    return jnp.clip(1 - u - scale * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u), 0, 1)


def cosmap(key: Array, n: int, config: Matching) -> Array:
    """t = 1 - 1 / (tan(pi u / 2) + 1), u uniform: the signal-to-noise ratios of the cosine schedule."""
    del config
    angle = jnp.pi / 2 * jax.random.uniform(key, (n,))
    return jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))


# Which way round the draws are. In the paper, and here, the draw is the noise level t itself. diffusers'
# `compute_density_for_timestep_sampling` returns the same law, but its training scripts use the draw u as an index into
# a table of noise levels that *falls* from 1 to 0, so they train at t = shift(1 - u). Uniform, mode, cosmap and
# logit-normal with mean 0 are symmetric about 1/2, and it makes no difference; a logit-normal mean m given to those
# scripts is -m here.
TIME_SAMPLERS = {"uniform": uniform, "logit_normal": logit_normal, "mode": mode, "cosmap": cosmap}

SMALLEST_TIME = 1e-3  # the lowest noise level of the 1000-step grids that released models were trained on


def no_weighting(t: Array) -> Array:
    return jnp.ones_like(t)


def sigma_sqrt_weighting(t: Array) -> Array:
    """t^-2, as diffusers has it under this name; held at t = 1/1000, since it has no bound at 0."""
    return jnp.maximum(t, SMALLEST_TIME) ** -2.0


def cosmap_weighting(t: Array) -> Array:
    """2 / (pi (1 - 2 t + 2 t^2)): with uniform times the same expected loss as drawing them from cosmap."""
    return 2 / (jnp.pi * (1 - 2 * t + 2 * t * t))


WEIGHTINGS = {"none": no_weighting, "sigma_sqrt": sigma_sqrt_weighting, "cosmap": cosmap_weighting}


def shift_time(t: Array, shift: float) -> Array:
    """t' = k t / (1 + (k - 1) t), with k = shift > 0: k > 1 moves times towards noise."""
    return shift * t / (1 + (shift - 1) * t)


@functools.cache  # so that it warns of a size once
def dynamic_shift(tokens: int) -> float:
    """FLUX's shift by picture size: exp(mu), mu linear in the tokens, 0.5 at 256 and 1.15 at 4096.

    3.16 at 4096 tokens, 25.3 at 16384 and 1e5 at 65536, where hardly a time below 1 is left: meant for 1K pictures, and
    beyond them a warning says so.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    shift = math.exp(0.5 + slope * (tokens - 256))
    if tokens > 1.25 * 4096:  # more than any aspect bucket of 1024 px has
        log.warning(
            "FLUX's dynamic shift is %.4g for %d tokens, which moves half of all times above %.4f: it is meant for up "
            "to 1024 px. Set a static one (lwd sample --shift 3; matching.shift_rule and sampling.shift_rule static).",
            shift, tokens, shift / (shift + 1),
        )  # fmt: skip
    return shift


SHIFT_RULES = {
    "none": lambda config, tokens: 1.0,
    "static": lambda config, tokens: config.shift,
    "dynamic": lambda config, tokens: dynamic_shift(tokens),
}
