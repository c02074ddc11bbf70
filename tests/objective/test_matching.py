"""Laws: loss and gradient equal torch; a mask of ones is the plain loss bit for bit; both arms report alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import rounded, traced

from lwd_jax.config import Matching
from lwd_jax.errors import UserError
from lwd_jax.objective.masks import supervision_mask
from lwd_jax.objective.matching import matching_loss
from lwd_jax.objective.saliency import wavelet_saliency
from lwd_jax.objective.wavelets import haar

TIMES = np.array([0.05, 0.45, 0.7, 0.97], np.float32)
PLAIN = Matching(mask="everywhere")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Z0, NOISE = normal(0, 4, 10, 13, 6), normal(1, 4, 10, 13, 6)
KERNEL, COND = normal(2, 6, 6) / 3, normal(3, 4, 6)


def predict(kernel):
    return lambda z_t, t, cond: jnp.tanh(z_t @ kernel) * t[:, None, None, None] + cond[:, None, None, :]


def loss_of(kernel, config):
    per_sample, metrics = matching_loss(predict(kernel), Z0, COND, TIMES, NOISE, config)
    return per_sample.mean(), (per_sample, metrics)


def run(config, kernel=KERNEL):
    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    (_, (per_sample, metrics)), gradient = jax.device_get(step(kernel, config))
    return per_sample, metrics, gradient


def by_torch(torch, config):
    """The stage-2 loss written again, channels first: `saliency` by convolution with the four Haar filters."""
    z0, noise = (torch.tensor(x).movedim(3, 1) for x in (Z0, NOISE))
    t = torch.tensor(TIMES)[:, None, None, None]
    kernel = torch.tensor(KERNEL, requires_grad=True)
    z_t = (1 - t) * z0 + t * noise
    source = z0 if config.source == "clean" else z_t
    source = source[:, :3] if config.saliency == "released_three_channels" else source
    signs = torch.tensor([[[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2.0
    folded = torch.nn.functional.pad(source, (0, 13 % 2, 0, 0), mode="replicate").flatten(0, 1)[:, None]
    bands = torch.nn.functional.conv2d(folded, signs[:, None], stride=2)
    energy = (bands**2).sum(1).unflatten(0, source.shape[:2]).mean(1, keepdim=True)
    energy = torch.nn.functional.interpolate(energy, size=(10, 13), mode="bilinear", align_corners=False)
    low, high = energy.amin((2, 3), keepdim=True), energy.amax((2, 3), keepdim=True)
    above = (energy - low) / (high - low + 1e-8) + config.floor - t
    step = (above / config.softness + 1).clamp(0, 1)
    mask = 3 * step**2 - 2 * step**3 if config.mask == "soft" else (above >= 0).float()
    velocity = torch.tanh(torch.einsum("bchw,cd->bdhw", z_t, kernel)) * t + torch.tensor(COND)[:, :, None, None]
    weight = t**-2 if config.weighting == "sigma_sqrt" else torch.ones_like(t)
    per_sample = (weight * (mask * (velocity - (noise - z0))) ** 2).mean((1, 2, 3))
    if config.normalise == "supervised":
        per_sample = per_sample / (mask**2).mean((1, 2, 3))
    per_sample.mean().backward()
    return per_sample.detach(), kernel.grad, mask.mean()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"source": "noisy", "weighting": "sigma_sqrt"},
        {"saliency": "released_three_channels", "normalise": "supervised", "floor": 0.45},
        {"mask": "soft", "softness": 0.4},
        {"mask": "soft", "softness": 0.4, "normalise": "supervised"},
    ],
)
def test_loss_and_gradient_equal_torch(changes):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(Matching(), **changes)
    per_sample, metrics, gradient = run(config)
    expected, expected_gradient, fraction = by_torch(torch, config)
    assert per_sample.shape == (4,) and per_sample.dtype == jnp.float32
    np.testing.assert_allclose(per_sample, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["supervised_fraction"], fraction, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected.mean(), rtol=2e-6)


@pytest.mark.parametrize("normalise", ["all", "supervised"])
@pytest.mark.parametrize("weighting", ["none", "cosmap"])
def test_mask_of_ones_is_the_plain_loss_bit_for_bit(normalise, weighting):
    def plain(kernel):
        t = TIMES[:, None, None, None]
        error = predict(kernel)((1 - t) * Z0 + t * NOISE, jnp.asarray(TIMES), COND) - (NOISE - Z0)
        weight = 2 / (jnp.pi * (1 - 2 * TIMES + 2 * TIMES * TIMES)) if weighting == "cosmap" else 1.0
        per_sample = weight * jnp.mean(error**2, axis=(1, 2, 3))
        return per_sample.mean(), per_sample

    config = dataclasses.replace(PLAIN, normalise=normalise, weighting=weighting)
    per_sample, metrics, gradient = run(config)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(KERNEL)
    np.testing.assert_array_equal(per_sample, expected)
    if normalise == "all":
        np.testing.assert_array_equal(gradient, expected_gradient)
    else:  # a quotient by exactly 1 changes how XLA groups the constants of the backward pass
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5)
    assert metrics["supervised_fraction"] == 1


def test_every_map_and_mask_reports_the_same_plain_errors():
    plain = run(PLAIN)[1]
    maps = [{"source": "noisy"}, {"saliency": "released_three_channels"}, {"levels": 2}]
    for config in (Matching(), *(dataclasses.replace(PLAIN, mask="soft", **changes) for changes in maps)):
        masked = run(config)[1]
        assert masked["supervised_fraction"] < 1 and masked["loss"] < plain["loss"]
        for name in ("loss_detail", "loss_smooth", "loss_by_time", "count_by_time"):
            np.testing.assert_allclose(masked[name], plain[name], rtol=1e-6)


def test_the_mask_has_the_wavelet_levels_floor_and_softness_of_the_config():
    saliency = wavelet_saliency(Z0, "db2", 2)
    mask = supervision_mask(saliency, TIMES, 0.2, "soft", 0.4)
    config = Matching(wavelet="db2", levels=2, floor=0.2, mask="soft", softness=0.4)
    np.testing.assert_allclose(run(config)[1]["supervised_fraction"], np.mean(mask), rtol=1e-5)


def test_no_gradient_and_no_loss_where_nothing_is_supervised():
    """A latent without detail has saliency 0: supervised up to the floor, not at all above it."""
    flat = np.ones_like(Z0)

    def loss(kernel, normalise):
        config = Matching(normalise=normalise)
        return matching_loss(predict(kernel), flat, COND, TIMES, NOISE, config)[0]

    for normalise in ("all", "supervised"):
        per_sample = np.asarray(jax.jit(loss, static_argnums=1)(KERNEL, normalise))
        assert per_sample[0] > 0 and (per_sample[1:] == 0).all()
        gradient = np.asarray(jax.jit(jax.jacobian(loss), static_argnums=1)(KERNEL, normalise))
        assert (gradient[1:] == 0).all() and np.isfinite(gradient).all()


def test_metrics_by_region_and_time():
    """The error is 2 in the detailed quarter (a checkered one), 1 in the half-detailed one, and 0 elsewhere."""
    z0 = np.zeros((5, 16, 16, 2), np.float32)
    z0[:, :8, :8] = 4 * (-1.0) ** np.add.outer(np.arange(8), np.arange(8))[..., None]
    z0[:, :8, 8:] = 2 * (-1.0) ** np.add.outer(np.arange(8), np.arange(8))[..., None]
    error = np.zeros_like(z0)
    error[:, :8, :8], error[:, :8, 8:] = 2, 1
    noise = normal(4, *z0.shape)
    t = np.array([0.1, 0.2, 0.45, 0.95, 1.0], np.float32)
    config = dataclasses.replace(PLAIN, time_bins=4)
    _, metrics = jax.jit(lambda: matching_loss(lambda z_t, t, cond: noise - z0 + error, z0, None, t, noise, config))()
    assert 3.5 < metrics["loss_detail"] <= 4.0  # the border of the regions blurs by a position
    assert metrics["loss_smooth"] == 0
    np.testing.assert_array_equal(metrics["count_by_time"], [2, 1, 0, 2])
    np.testing.assert_allclose(metrics["loss_by_time"], [2.5, 1.25, 0, 2.5], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 1.25, rtol=1e-5)


def test_wavelet_regression_of_diffusion_4k_is_a_time_weight():
    """With an orthonormal transform, the squared error of x0_hat = z_t - t v_hat in Haar bands is t^2 times the
    velocity's."""
    z0, noise, velocity = normal(5, 3, 2, 8, 12, 4)
    for t in (0.2, 0.9):
        z_t = (1 - t) * z0 + t * noise
        pairs = zip(*jax.device_get((haar(z_t - t * velocity), haar(z0))))
        bands = [np.sum((ours - clean) ** 2) for ours, clean in pairs]
        np.testing.assert_allclose(sum(bands), t**2 * np.sum((velocity - (noise - z0)) ** 2), rtol=1e-5)


def test_is_float32_whatever_the_model_computes_in():
    per_sample, _, _ = run(Matching())
    low = jnp.bfloat16

    def low_predict(*args):
        return predict(KERNEL)(*args).astype(low)

    per_sample_low, metrics = jax.jit(
        lambda: matching_loss(low_predict, Z0.astype(low), COND, TIMES, NOISE.astype(low), Matching())
    )()
    assert per_sample_low.dtype == jnp.float32 and all(value.dtype == jnp.float32 for value in metrics.values())
    np.testing.assert_allclose(per_sample_low, per_sample, rtol=0.1)


def test_products_are_in_full_precision():
    """By the traced program, and apart from the model's own: the metrics by time are float32 on a GPU and a TPU too."""

    def loss(prediction, z0):
        return matching_loss(lambda z_t, t, cond: prediction, z0, None, TIMES, NOISE, Matching())

    assert not rounded(traced(loss, NOISE, Z0))


@pytest.mark.parametrize(
    "changes, named", [({"saliency": "wavlet"}, "saliency 'wavlet'"), ({"weighting": "sigma"}, "weighting 'sigma'")]
)
def test_mistakes_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        loss_of(KERNEL, Matching(**changes))
