"""Laws: all four terms are alive and equal torch; the scale changes from step to step in one compiled program."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.config import Reconstruction
from lwd_jax.errors import UserError
from lwd_jax.objective.reconstruction import gaussian_kl, pool, psnr, reconstruction_loss

X = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
MEAN_ONLY = Reconstruction(beta=0.02, sample_posterior=False)


class Posterior(NamedTuple):
    mean: jax.Array
    logvar: jax.Array | None


def weights():
    random = np.random.default_rng(1)
    return {
        name: (random.normal(size=shape) / 4).astype(np.float32)
        for name, shape in {"encode": (12, 8), "decode": (4, 12)}.items()
    }


def encode(params, x):
    """A linear autoencoder of factor 2 on 2 x 2 blocks."""
    batch, height, width, _ = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    mean, logvar = jnp.split(blocks.reshape(batch, height // 2, width // 2, 12) @ params["encode"], 2, axis=3)
    return Posterior(mean, logvar)


def decode(params, z):
    blocks = jnp.tanh(z @ params["decode"]).reshape(*z.shape[:3], 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(z.shape[0], 2 * z.shape[1], 2 * z.shape[2], 3)


def perceptual(x, y):
    return jnp.mean(jnp.abs(jnp.diff(x, axis=1) - jnp.diff(y, axis=1)), axis=(1, 2, 3))


def loss_of(params, key, config, x=X):
    per_sample, metrics = reconstruction_loss(
        lambda x: encode(params, x), lambda z: decode(params, z), x, key, config, perceptual
    )
    return per_sample.mean(), (per_sample, metrics)


STEP = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=2)


def by_torch(torch, config, scale):
    params = {name: torch.tensor(value, requires_grad=True) for name, value in weights().items()}
    x = torch.tensor(X).movedim(3, 1)

    def decode(z):
        blocks = torch.tanh(torch.einsum("bchw,cd->bdhw", z, params["decode"])).unflatten(1, (2, 2, 3))
        b, _, _, _, h, w = blocks.shape
        return torch.einsum("bijchw->bchiwj", blocks).reshape(b, 3, 2 * h, 2 * w)

    blocks = torch.einsum("bchiwj->bijchw", x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))).flatten(1, 3)
    posterior = torch.einsum("bchw,cd->bdhw", blocks, params["encode"])
    mean, logvar = posterior.chunk(2, dim=1)
    distance = torch.abs if config.distance == "l1" else torch.square
    decoded = decode(mean)
    down = torch.nn.functional.avg_pool2d
    normal, standard = torch.distributions.Normal(mean, torch.exp(0.5 * logvar)), torch.distributions.Normal(0.0, 1.0)
    terms = {
        "reconstruction": distance(decoded - x).mean((1, 2, 3)),
        "scale_consistency": distance(decode(down(mean, scale)) - down(x, scale)).mean((1, 2, 3)),
        "kl": torch.distributions.kl_divergence(normal, standard).mean((1, 2, 3)),
        "lpips": (decoded.diff(dim=2) - x.diff(dim=2)).abs().mean((1, 2, 3)),
    }
    factors = {"reconstruction": 1, "scale_consistency": config.alpha, "kl": config.beta, "lpips": config.lpips}
    per_sample = sum(factors[name] * term for name, term in terms.items())
    per_sample.mean().backward()
    return per_sample.detach(), {k: v.mean().item() for k, v in terms.items()}, {k: v.grad for k, v in params.items()}


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("scale", [2, 4])
def test_terms_and_gradient_equal_torch(distance, scale):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(MEAN_ONLY, distance=distance, scales=(scale,), alpha=0.25)
    (_, (per_sample, metrics)), gradient = STEP(weights(), jax.random.key(0), config)
    expected, terms, expected_gradient = by_torch(torch, config, scale)
    assert per_sample.dtype == jnp.float32
    np.testing.assert_allclose(per_sample, expected, rtol=2e-6)
    for name, value in terms.items():
        assert value > 1e-3
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    for name, value in expected_gradient.items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-4, atol=1e-6)


def test_one_program_draws_every_scale():
    """Per key, loss and gradient are those of one of the scales alone, and both scales turn up; nothing recompiles."""
    alone = {s: STEP(weights(), jax.random.key(0), dataclasses.replace(MEAN_ONLY, scales=(s,))) for s in (2, 4)}
    before = STEP._cache_size()
    seen = []
    for seed in range(12):
        (loss, (_, metrics)), gradient = STEP(weights(), jax.random.key(seed), MEAN_ONLY)
        near = {s: abs(float(metrics["scale_consistency"] - alone[s][0][1][1]["scale_consistency"])) for s in alone}
        seen.append(min(near, key=near.get))
        np.testing.assert_allclose(loss, alone[seen[-1]][0][0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradient, alone[seen[-1]][1])
    assert {2, 4} == set(seen) and STEP._cache_size() == before + 1


@pytest.mark.parametrize("batch", [1, 2])
def test_rematerialised_gradient_equals_finite_differences(batch):
    """Jitted, at local batch 1 too, where XLA's CPU backend has been seen to get rematerialised gradients wrong."""
    config = dataclasses.replace(MEAN_ONLY, alpha=50.0)  # the term under jax.checkpoint dominates
    key, x = jax.random.key(3), X[:batch]
    value = jax.jit(lambda params: loss_of(params, key, config, x)[0])
    gradient = jax.jit(jax.grad(lambda params: loss_of(params, key, config, x)[0]))(weights())
    for name, kernel in weights().items():
        way = np.random.default_rng(5).normal(size=kernel.shape).astype(np.float32)
        ahead, behind = (float(value(weights() | {name: kernel + step * way})) for step in (3e-3, -3e-3))
        np.testing.assert_allclose(np.sum(np.asarray(gradient[name]) * way), (ahead - behind) / 6e-3, rtol=5e-3)


def test_posterior_is_sampled_with_its_own_deviation():
    """Decoded as itself against a black picture, the reconstruction term is the latent's mean square."""
    mean, logvar = (np.full((1, 64, 64, 3), value, np.float32) for value in (0.7, 2 * np.log(0.3)))
    posterior = Posterior(mean, logvar)

    @partial(jax.jit, static_argnums=0)
    def mean_square(sample, key):
        config = Reconstruction(alpha=0.0, lpips=0.0, sample_posterior=sample)
        x = jnp.zeros((1, 64, 64, 3))
        return reconstruction_loss(lambda x: posterior, lambda z: z, x, key, config, None)[1]["reconstruction"]

    first, second = (mean_square(True, jax.random.key(seed)) for seed in (0, 1))
    assert first != second
    np.testing.assert_allclose([first, second], 0.7**2 + 0.3**2, atol=0.02)
    np.testing.assert_allclose(mean_square(False, jax.random.key(0)), 0.7**2, rtol=1e-6)


def test_the_sample_and_the_scale_have_keys_of_their_own():
    """Decoded as itself against a black picture, both terms tell the drawn latent, and the second its scale."""
    mean, logvar = np.random.default_rng(8).normal(size=(2, 1, 8, 8, 3)).astype(np.float32)
    config, x = Reconstruction(lpips=0.0, scales=(2, 4)), np.zeros((1, 8, 8, 3), np.float32)
    program = jax.jit(
        lambda key: reconstruction_loss(lambda x: Posterior(mean, logvar), lambda z: z, x, key, config, None)
    )
    scales = []
    for key in jax.random.split(jax.random.key(0), 6):
        of_sample, of_scale = jax.random.split(key)
        z = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(of_sample, mean.shape))
        scales.append(config.scales[int(jax.random.randint(of_scale, (), 0, 2))])
        metrics = program(key)[1]
        np.testing.assert_allclose(metrics["reconstruction"], np.mean(z**2), rtol=1e-5)
        pooled = z.reshape(8 // scales[-1], scales[-1], -1, scales[-1], 3).mean(axis=(1, 3))
        np.testing.assert_allclose(metrics["scale_consistency"], np.mean(pooled**2), rtol=1e-5)
    assert set(scales) == {2, 4}


def test_a_posterior_without_variance_has_no_kl():
    def point(x):
        return Posterior(encode(weights(), x).mean, None)

    args = (point, lambda z: decode(weights(), z), X, jax.random.key(0), MEAN_ONLY, perceptual)
    per_sample, metrics = jax.jit(lambda: reconstruction_loss(*args))()
    assert metrics["kl"] == 0 and (per_sample > 0).all()


def test_terms_of_weight_0_are_not_computed():
    def forbidden(*args):
        raise AssertionError("computed")

    shapes = []

    def watched(z):
        shapes.append(z.shape)
        return decode(weights(), z)

    config = Reconstruction(alpha=0.0, lpips=0.0)
    args = (lambda x: encode(weights(), x), watched, X, jax.random.key(0), config, forbidden)
    per_sample, metrics = jax.jit(lambda: reconstruction_loss(*args))()
    assert shapes == [(2, 8, 12, 4)]
    assert metrics["scale_consistency"] == metrics["lpips"] == 0
    np.testing.assert_allclose(metrics["loss"], metrics["reconstruction"])


def test_kl_of_the_standard_normal_is_0():
    zero = np.zeros((2, 3, 3, 2), np.float32)
    of = jax.jit(gaussian_kl)
    np.testing.assert_array_equal(of(zero, zero), 0)
    assert np.all(np.asarray(of(zero, zero + 1)) > 0) and np.all(np.asarray(of(zero + 1, zero)) == 0.5)


def test_pool_is_the_block_mean():
    x = np.arange(2 * 4 * 8 * 3, dtype=np.float32).reshape(2, 4, 8, 3)
    assert pool(x, 4).shape == (2, 1, 2, 3)
    np.testing.assert_allclose(pool(x, 2)[1, 1, 3], x[1, 2:, 6:].mean(axis=(0, 1)))


def test_psnr_is_of_pictures_on_range_255():
    skimage = pytest.importorskip("skimage.metrics")
    y = np.clip(X + 0.1 * np.random.default_rng(7).normal(size=X.shape).astype(np.float32), -1, 1)
    for i, value in enumerate(np.asarray(jax.jit(psnr)(X, y))):
        expected = skimage.peak_signal_noise_ratio((X[i] + 1) * 127.5, (y[i] + 1) * 127.5, data_range=255)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(psnr)(X, X), 100)
    np.testing.assert_allclose(jax.jit(psnr)(np.full_like(X, 1.5), np.ones_like(X)), 100)  # after clipping


def test_mistakes_are_named():
    args = (lambda x: encode(weights(), x), lambda z: decode(weights(), z))
    with pytest.raises(UserError, match="no LPIPS network"):
        reconstruction_loss(*args, X, jax.random.key(0), Reconstruction(), None)
    with pytest.raises(UserError, match="16 x 20 px .* scale 4"):
        reconstruction_loss(*args, X[:, :, :20], jax.random.key(0), MEAN_ONLY, perceptual)
