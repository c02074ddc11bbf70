"""The stage-1 loss: scale-consistent fine-tuning of an autoencoder (Latent Wavelet Diffusion, arXiv 2506.00433)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lwd_jax.config import Reconstruction
from lwd_jax.errors import UserError, choose
from lwd_jax.shapes import Array, shaped

DISTANCES = {"l2": jnp.square, "l1": jnp.abs}


@shaped("x: B H W C -> B _ _ C")
def pool(x: Array, scale: int) -> Array:
    """Means of scale x scale blocks, [B H/scale W/scale C].

    Raises:
      UserError: a side that `scale` does not divide.
    """
    batch, height, width, channels = x.shape
    if height % scale or width % scale:
        raise UserError(f"A size of {height} x {width} does not divide into blocks of {scale} x {scale}.")
    return x.reshape(batch, height // scale, scale, width // scale, scale, channels).mean(axis=(2, 4))


def _per_sample(x: Array) -> Array:
    return jnp.mean(x, axis=(1, 2, 3))


def gaussian_kl(mean: Array, logvar: Array) -> Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)), exact, as a mean over the latent's elements: [B]."""
    return 0.5 * _per_sample(mean**2 + jnp.exp(logvar) - 1 - logvar)


def _latent(posterior, key: Array, sample: bool) -> tuple[Array, Array]:
    """The latent to decode, float32, and the KL term [B]; a posterior without variance is a point and has none."""
    mean = posterior.mean.astype(jnp.float32)
    if posterior.logvar is None:
        return mean, jnp.zeros(mean.shape[0])
    logvar = posterior.logvar.astype(jnp.float32)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape) if sample else mean
    return z, gaussian_kl(mean, logvar)


def _scale_consistency(decode: Callable, z: Array, x: Array, key: Array, config: Reconstruction) -> Array:
    """Distance of D(pool_s(z)) and pool_s(x), [B], with one s of `config.scales` per step.

    The shapes differ by s, so there is one branch per s in one program, chosen when it runs. The whole choice, where
    there is one, is rematerialised: a conditional otherwise hands the residuals of every branch to the backward pass,
    taken or not, and one more pooled decode costs at most a quarter of the full one.
    """
    distance = choose(DISTANCES, config.distance, "distance")
    for scale in config.scales:
        if any(side % scale for side in z.shape[1:3]):
            height, width = x.shape[1:3]
            raise UserError(f"A picture of {height} x {width} px has a latent that does not divide by scale {scale}.")

    def branch(scale):
        return lambda z, x: _per_sample(distance(decode(pool(z, scale)).astype(jnp.float32) - pool(x, scale)))

    branches = [branch(scale) for scale in config.scales]
    if len(branches) == 1:
        return branches[0](z, x)
    drawn = jax.random.randint(key, (), 0, len(branches))
    return jax.checkpoint(lambda drawn, z, x: jax.lax.switch(drawn, branches, z, x))(drawn, z, x)


def psnr(x: Array, y: Array) -> Array:
    """Peak signal-to-noise ratio in dB per sample, [B], of pictures in [-1, 1] (range 2); 100 dB at most."""
    error = _per_sample((jnp.clip(x, -1, 1) - jnp.clip(y, -1, 1)) ** 2)
    return -10 * jnp.log10(jnp.maximum(error / 4, 1e-10))


@shaped("x: B H W 3")
def reconstruction_loss(
    encode: Callable, decode: Callable, x: Array, key: Array, config: Reconstruction, perceptual: Callable | None
) -> tuple[Array, dict[str, Array]]:
    """|D(z) - x|^2 + alpha |D(pool_s(z)) - pool_s(x)|^2 + beta KL(q(z|x) || N(0, I)) + lambda LPIPS(D(z), x).

    Every term is a mean over its elements: pixels and colours, or the latent's elements for the KL term. (The first
    latent diffusion models sum both instead; their KL weight times latent elements over picture elements is beta
    here.) The paper writes D(E(x pooled)) in the second term; what its code trains, and what is meant, is D of the
    pooled latent against the pooled picture.

    Args:
      encode: picture [B H W 3] -> Posterior(mean, logvar or None), unscaled; it bounds logvar so that exp(logvar) is
        finite.
      decode: unscaled latent [B h w C] -> picture [B H W 3], unclipped.
      x: pictures in [-1, 1].
      key: random key of the posterior's sample and of the scale s.
      config: distance and weights; a term of weight 0 is not computed, the KL excepted.
      perceptual: (x, y) -> [B] for pictures in [-1, 1] (`lpips.load_lpips()`); None only where its weight is 0.

    Returns:
      The loss per sample [B] float32, and metrics, means over the batch: loss, reconstruction, scale_consistency, kl,
      lpips (unweighted; 0 where not computed) and psnr (dB, after clipping).

    Raises:
      UserError: a picture whose latent a scale does not divide; LPIPS has a weight and `perceptual` is None.
    """
    if config.lpips and perceptual is None:
        raise UserError("Config field 'reconstruction.lpips' is not 0, but no LPIPS network was loaded.")
    x = x.astype(jnp.float32)
    sample_key, scale_key = jax.random.split(key)
    with jax.named_scope("encode"):
        posterior = encode(x)
    with jax.named_scope("posterior"):
        z, kl = _latent(posterior, sample_key, config.sample_posterior)
    with jax.named_scope("decode"):
        decoded = decode(z).astype(jnp.float32)
    terms = {"kl": kl} | dict.fromkeys(("scale_consistency", "lpips"), jnp.zeros(x.shape[0]))
    if config.alpha:
        with jax.named_scope("scale_consistency"):
            terms["scale_consistency"] = _scale_consistency(decode, z, x, scale_key, config)
    if config.lpips:
        with jax.named_scope("lpips"):
            terms["lpips"] = perceptual(decoded, x)
    with jax.named_scope("loss"):
        terms["reconstruction"] = _per_sample(choose(DISTANCES, config.distance, "distance")(decoded - x))
        weights = {"reconstruction": 1.0, "scale_consistency": config.alpha, "kl": config.beta, "lpips": config.lpips}
        per_sample = sum(weight * terms[name] for name, weight in weights.items())
    with jax.named_scope("metrics"):
        metrics = {"loss": per_sample} | terms | {"psnr": psnr(decoded, x)}
        return per_sample, {name: jnp.mean(value) for name, value in metrics.items()}
