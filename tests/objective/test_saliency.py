"""Laws: saliency reads every channel, does not change with sign and scale, is 0 on a constant, and equals torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from lwd_jax.objective.masks import supervision_mask
from lwd_jax.objective.saliency import SALIENCIES, released_three_channels, wavelet_saliency

ALL = [("haar", 1), ("haar", 2), ("db3", 1), ("sym4", 2)]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (1, 6)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_torch_and_pywavelets(size, dtype):
    torch = pytest.importorskip("torch")
    sizes = np.array([1, 0.03, 1e-3], np.float32)[:, None, None, None]  # of the last the 1e-8 is a share
    z = (sizes * normal(0, 3, *size, 16)).astype(dtype)
    _, details = pywt.dwt2(np.asarray(z, np.float64), "haar", mode="symmetric", axes=(1, 2))
    energy = torch.tensor(sum(np.mean(band**2, axis=3) for band in details))[:, None]
    energy = torch.nn.functional.interpolate(energy, size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = (getattr(energy, f)(dim=(1, 2), keepdim=True) for f in ("amin", "amax"))
    saliency = np.asarray(wavelet_saliency(z))
    assert saliency.dtype == np.float32 and saliency.shape == (3, *size, 1)
    np.testing.assert_allclose(saliency[..., 0], (energy - low) / (high - low + 1e-8), atol=3e-6)


@pytest.mark.parametrize("wavelet, levels", ALL)
def test_lies_between_0_and_1_and_reaches_both(wavelet, levels):
    saliency = np.asarray(wavelet_saliency(normal(1, 2, 24, 17, 4), wavelet, levels))
    np.testing.assert_array_equal(saliency.min(axis=(1, 2, 3)), 0)
    np.testing.assert_allclose(saliency.max(axis=(1, 2, 3)), 1, atol=1e-6)


@pytest.mark.parametrize("channel", range(16))
def test_reads_every_channel(channel):
    z = np.zeros((1, 8, 8, 16), np.float32)
    z[0, 2, 5, channel] = 1
    saliency = np.asarray(wavelet_saliency(z))[0, ..., 0]
    assert saliency.max() > 0.99 and saliency[2, 5] == saliency.max()


def test_the_released_code_reads_three_channels():
    z = normal(2, 2, 8, 8, 16)
    other = np.concatenate([z[..., :3], normal(3, 2, 8, 8, 13)], axis=3)
    np.testing.assert_array_equal(released_three_channels(z), released_three_channels(other))
    np.testing.assert_array_equal(released_three_channels(z), SALIENCIES["wavelet"](z[..., :3]))
    assert np.abs(np.asarray(wavelet_saliency(z)) - np.asarray(wavelet_saliency(other))).max() > 0.1


@pytest.mark.parametrize("wavelet, levels", ALL)
def test_does_not_change_with_sign_and_scale(wavelet, levels):
    z = normal(4, 2, 15, 18, 4)
    saliency = wavelet_saliency(z, wavelet, levels)
    np.testing.assert_array_equal(saliency, wavelet_saliency(-z, wavelet, levels))
    for scale in (0.25, 3.7, 1e3):
        np.testing.assert_allclose(saliency, wavelet_saliency(z * np.float32(scale), wavelet, levels), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("levels", [1, 2])
def test_is_0_on_a_constant(size, levels):
    values = np.array([0, 1, -0.3, 1e-3, 1e4], np.float32)
    z = np.ones((5, *size, 3), np.float32) * values[:, None, None, None] * np.array([1, 1.7, -0.3], np.float32)
    np.testing.assert_array_equal(wavelet_saliency(z, "haar", levels), 0)


def test_each_sample_has_its_own_range():
    z = normal(5, 2, 8, 8, 3)
    both = wavelet_saliency(z * np.array([1, 100], np.float32)[:, None, None, None])
    alone = [wavelet_saliency(z[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-6)


def test_supervised_fraction_of_pure_noise():
    """Golden numbers of one draw with 16 channels, 256 x 256, floor 0.3. The largest energy of a draw sets the scale
    of its map, so that single draws differ by half at t = 0.9; the mean of eight comes near."""
    saliency = wavelet_saliency(jax.random.normal(jax.random.key(0), (8, 256, 256, 16)))
    expected = {0.3: 1.0, 0.5: 0.98, 0.6: 0.84, 0.7: 0.53, 0.8: 0.23, 0.9: 0.065, 1.0: 0.013}
    for t, fraction in expected.items():
        ours = np.asarray(supervision_mask(saliency, np.full(8, t, np.float32))).mean()
        np.testing.assert_allclose(ours, fraction, rtol=0.2 if t > 0.75 else 0.08, err_msg=f"t = {t}")
    times = np.arange(5, 1001, 10, np.float32) / 1000
    mean = jax.jit(lambda: jax.lax.map(lambda t: supervision_mask(saliency[:1], t[None]).mean(), times).mean())()
    np.testing.assert_allclose(mean, 0.717, atol=0.03)
