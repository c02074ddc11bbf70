"""The stage-2 loss: flow matching under the wavelet mask (Latent Wavelet Diffusion, arXiv 2506.00433).

The plain baseline is this same code with a mask of ones (`mask="everywhere"`), bit for bit the plain loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lwd_jax.config import Matching
from lwd_jax.errors import choose
from lwd_jax.objective.masks import supervision_mask
from lwd_jax.objective.paths import SHIFT_RULES, TIME_SAMPLERS, WEIGHTINGS, noised, shift_time, velocity
from lwd_jax.objective.saliency import SALIENCIES, wavelet_saliency
from lwd_jax.shapes import Array, shaped


def draw_times(key: Array, n: int, config: Matching, tokens: int) -> Array:
    """Times of n training samples: the sampler, then the shift.

    Args:
      key: random key.
      n: how many.
      config: `time_sampler` with its parameters, `shift_rule` and `shift`.
      tokens: picture tokens of one sample, (h / patch) (w / patch); the dynamic shift depends on it.

    Returns:
      [n] float32 in [0, 1].

    Raises:
      UserError: an unknown sampler or shift rule, or a parameter out of range.
    """
    t = choose(TIME_SAMPLERS, config.time_sampler, "time sampler")(key, n, config)
    return shift_time(t, choose(SHIFT_RULES, config.shift_rule, "shift rule")(config, tokens))


def _regions(squares: Array, saliency: Array) -> tuple[Array, Array]:
    """Mean of `squares` [B h w 1] over the quarter of each sample's positions with most and with least saliency.

    Positions as salient as the last of their quarter count too, so that ties need no order.
    """
    squares, saliency = (x.reshape(x.shape[0], -1) for x in (squares, saliency))
    ordered = jnp.sort(saliency, axis=1)
    quarter = max(saliency.shape[1] // 4, 1)
    detail = saliency >= ordered[:, -quarter, None]
    smooth = saliency <= ordered[:, quarter - 1, None]
    return tuple(jnp.mean(jnp.mean(squares, axis=1, where=region)) for region in (detail, smooth))


def _metrics(squares: Array, clean_saliency: Array, mask: Array, t: Array, bins: int) -> dict[str, Array]:
    """What both arms report alike: none of it but `supervised_fraction` depends on the mask."""
    detail, smooth = _regions(squares, clean_saliency)
    bin_of = jnp.clip(jnp.floor(t * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(bin_of, bins)
    return {
        "supervised_fraction": jnp.mean(mask),
        "loss_detail": detail,
        "loss_smooth": smooth,
        "loss_by_time": jnp.matmul(jnp.mean(squares, axis=(1, 2, 3)), member, precision=jax.lax.Precision.HIGHEST),
        "count_by_time": jnp.sum(member, axis=0),
    }


def saliency_of(z: Array, config: Matching) -> Array:
    """[B h w 1]: the map that a config makes of latents [B h w C].

    Raises:
      UserError: an unknown saliency or wavelet.
    """
    return choose(SALIENCIES, config.saliency, "saliency")(z, config.wavelet, config.levels)


def mask_of(z0: Array, z_t: Array, t: Array, config: Matching) -> Array:
    """[B h w 1]: the mask that a config trains with, of the map of its source, z0 or z_t [B h w C], at t [B].

    Raises:
      UserError: an unknown saliency, wavelet or mask rule.
    """
    saliency = saliency_of(z0 if config.source == "clean" else z_t, config)
    return supervision_mask(saliency, t, config.floor, config.mask, config.softness)


@shaped("z0: B h w C, t: B, noise: B h w C")
def matching_loss(
    predict: Callable, z0: Array, cond, t: Array, noise: Array, config: Matching
) -> tuple[Array, dict[str, Array]]:
    """mean over h, w and C of w(t) (M (v_hat - v))^2, the loss of arXiv 2506.00433 on the rectified-flow velocity.

    The mean is over all elements, not over supervised ones. `config.normalise = "supervised"` divides it by the
    sample's mean M^2 (the supervised fraction, for a mask of 0 and 1); a sample with nothing supervised gives 0.

    Args:
      predict: (z_t [B h w C], t [B], cond) -> velocity [B h w C].
      z0: clean latent [B h w C], scaled.
      cond: conditioning, handed to `predict`.
      t: [B] in [0, 1], 1 = noise (see `draw_times`).
      noise: standard normal [B h w C].
      config: the mask, its map's source, weighting and normalisation.

    Returns:
      The loss per sample [B] float32, and metrics (float32):
        loss: mean over the batch of the loss.
        supervised_fraction: mean of the mask.
        loss_detail, loss_smooth: plain squared error of the velocity (no mask, no weight) in the quarter of positions
          with most and with least Haar saliency of z0, whatever `config` trains with.
        loss_by_time, count_by_time [time_bins]: sum of the plain squared errors of the samples in each of `time_bins`
          equal bins of t, and their number; both add up over batches, and the quotient is the mean.

    Raises:
      UserError: an unknown saliency, wavelet, mask rule or weighting.
    """
    z0, noise, t = (jnp.asarray(x, jnp.float32) for x in (z0, noise, t))
    with jax.named_scope("path"):
        z_t, target = noised(z0, noise, t), velocity(z0, noise)
    with jax.named_scope("mask"):
        # The map says where to learn; it is not learned itself.
        mask = jax.lax.stop_gradient(mask_of(z0, z_t, t, config))

    with jax.named_scope("prediction"):
        prediction = predict(z_t, t, cond).astype(jnp.float32)
    with jax.named_scope("loss"):
        error = prediction - target
        weight = choose(WEIGHTINGS, config.weighting, "weighting")(t)
        per_sample = weight * jnp.mean((mask * error) ** 2, axis=(1, 2, 3))
        if config.normalise == "supervised":
            positions = z0.shape[1] * z0.shape[2]
            per_sample /= jnp.maximum(jnp.mean(mask**2, axis=(1, 2, 3)), 1 / positions)

    with jax.named_scope("metrics"):
        squares = jnp.mean(jax.lax.stop_gradient(error) ** 2, axis=3, keepdims=True)
        metrics = _metrics(squares, wavelet_saliency(z0), mask, t, config.time_bins)
    return per_sample, {"loss": jnp.mean(per_sample)} | metrics
