"""Noise and conditioning -> latent -> picture."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lwd_jax.autoencoders import kl
from lwd_jax.errors import choose
from lwd_jax.sample.solvers import SOLVERS


def initial_noise(seed: int, indices, shape: tuple[int, int, int]) -> jax.Array:
    """Standard normal noise that depends on the seed and on each picture's own index only.

    Picture i is `jax.random.normal(fold_in(key(seed), i))`: the same whatever else is in its batch, how many pictures
    are asked for, or on how many devices it is made.

    Args:
      seed: of the whole job.
      indices: [B] integers, the pictures' positions in it.
      shape: (h, w, C) of one latent.

    Returns:
      [B h w C] float32.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(jnp.asarray(indices))


def guided(predict, cond, null_cond, guidance):
    """Classifier-free guidance (arXiv 2207.12598), both halves in one doubled batch.

    Args:
      predict: (z_t, t [B], cond) -> velocity.
      cond, null_cond: Conditioning of the prompt and of the empty (or negative) one; None = no guidance.
      guidance: scale w of v_null + w (v_cond - v_null).

    Returns:
      (z_t, scalar t) -> velocity.
    """

    def plain(z, t):
        return predict(z, jnp.full(z.shape[:1], t, jnp.float32), cond)

    def doubled(z, t):
        both = jax.tree.map(lambda null, own: jnp.concatenate([null, own]), null_cond, cond)
        v = predict(jnp.concatenate([z, z]), jnp.full(2 * len(z), t, jnp.float32), both)
        v_null, v_cond = jnp.split(v, 2)
        return v_null + guidance * (v_cond - v_null)

    return plain if null_cond is None else doubled


def generate(predict, noise, cond, null_cond, guidance, sigmas, solver="euler"):
    """Solves the flow from noise to a clean latent; pure, to be jitted by whoever holds the parameters.

    Args:
      predict: (z_t [B h w C], t [B], cond) -> velocity [B h w C] float32.
      noise: [B h w C], the latent at t = 1.
      cond, null_cond: Conditioning; null_cond None = no guidance.
      guidance: scale; without effect where null_cond is None.
      sigmas: [steps + 1] of `schedule.sigmas`.
      solver: a row of SOLVERS.

    Returns:
      z0 [B h w C] float32, scaled as the backbone sees it.
    """
    solve = choose(SOLVERS, solver, "solver")
    return solve(guided(predict, cond, null_cond, guidance), jnp.asarray(noise, jnp.float32), jnp.asarray(sigmas))


@functools.lru_cache(maxsize=8)  # one compiled program per module and solver, however often it is asked for
def make_sampler(backbone, solver="euler"):
    """`f(params, noise, cond, null_cond, guidance, sigmas) -> z0` of a backbone module, jitted; see `generate`."""
    choose(SOLVERS, solver, "solver")

    def sample(params, noise, cond, null_cond, guidance, sigmas):
        def predict(z_t, t, cond):
            return backbone.apply({"params": params}, z_t, t, cond)

        return generate(predict, noise, cond, null_cond, guidance, sigmas, solver)

    return jax.jit(sample)


def to_uint8(x):
    """Picture in [-1, 1], unclipped, float -> uint8 in [0, 255], as diffusers' VaeImageProcessor does."""
    return jnp.round(jnp.clip(x.astype(jnp.float32) * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


@functools.lru_cache(maxsize=8)
def make_decoder(autoencoder):
    """`f(params, z0 [B h w C]) -> uint8 [B H W 3]` of an autoencoder module, jitted; z0 as the backbone sees it."""

    def decode(params, z0):
        z = kl.unscale(autoencoder.config, jnp.asarray(z0, jnp.float32))
        return to_uint8(autoencoder.apply({"params": params}, z, method="decode"))

    return jax.jit(decode)


def groups(count: int, together: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pictures so many at a time: memory does not grow with their number.

    Args:
      count: of the pictures.
      together: how many at a time.

    Yields:
      The rows of a group [together], and how many of them are new: the last group is filled up with copies of the last
      picture, so that one program serves all.
    """
    for start in range(0, count, together):
        yield np.minimum(np.arange(start, start + together), count - 1), min(together, count - start)
