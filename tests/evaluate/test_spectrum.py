"""Spectra against the DCT's defining sum, JPEG's zig-zag, and images whose frequencies are known."""

import numpy as np
import pytest

from lwd_jax.evaluate.spectrum import block_mean, high_frequency_share, latent_spectrum, rgb_reference, zigzag


def dct_basis(n):
    """Rows: the orthonormal DCT-II of length n, from its definition."""
    k, i = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    basis = np.sqrt(2 / n) * np.cos(np.pi * (2 * i + 1) * k / (2 * n))
    basis[0] /= np.sqrt(2)
    return basis


def test_zigzag_is_jpegs():
    expected = [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48]
    assert zigzag(8)[:22].tolist() == expected
    assert zigzag(8)[-3:].tolist() == [55, 62, 63]
    assert sorted(zigzag(5)) == list(range(25))


@pytest.mark.parametrize("block,shape", [(8, (3, 19, 33, 5)), (4, (1, 4, 4, 1)), (8, (2, 8, 16, 16))])
def test_spectrum_equals_the_defining_sum(block, shape):
    z = np.random.default_rng(0).normal(0.3, 1, shape).astype(np.float32)
    basis = dct_basis(block)
    amplitudes = []
    for channel in range(shape[-1]):
        coefficients = [
            np.abs(basis @ image[r : r + block, c : c + block, channel] @ basis.T)
            for image in z.astype(np.float64)
            for r in range(0, shape[1] - block + 1, block)
            for c in range(0, shape[2] - block + 1, block)
        ]
        amplitudes.append(np.mean(coefficients, axis=0).ravel()[zigzag(block)])
    log = np.log10(np.array(amplitudes))
    log -= log[:, :1]
    spectrum = latent_spectrum(z, block)
    np.testing.assert_allclose(spectrum.mean, log.mean(0), atol=1e-10)
    np.testing.assert_allclose(spectrum.std, log.std(0), atol=1e-10)


def test_spectrum_does_not_see_scale_and_starts_at_zero():
    z = np.random.default_rng(1).normal(1, 1, (2, 16, 16, 4))
    a, b = latent_spectrum(z), latent_spectrum(-7 * z)
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-10)
    assert a.mean[0] == 0 and a.std[0] == 0


def test_one_cosine_is_one_frequency():
    block = 8
    basis = dct_basis(block)
    picture = 3 + np.outer(basis[0], basis[5])
    mean = latent_spectrum(picture[None, :, :, None], block).mean
    at = zigzag(block).tolist().index(5)
    assert np.argmax(mean[1:]) + 1 == at
    np.testing.assert_allclose(mean[at], np.log10(1 / (3 * block)), atol=1e-9)


def test_too_small_a_latent_is_refused():
    with pytest.raises(ValueError, match="8x8 positions, not 7x9"):
        latent_spectrum(np.zeros((1, 7, 9, 3)))


def test_block_mean_and_reference():
    x = np.random.default_rng(2).uniform(-1, 1, (2, 130, 67, 3)).astype(np.float32)
    pooled = block_mean(x, 8)
    assert pooled.shape == (2, 16, 8, 3)
    np.testing.assert_allclose(pooled[1, 3, 2, 0], x[1, 24:32, 16:24, 0].mean(), rtol=1e-5)
    np.testing.assert_array_equal(rgb_reference(x, 8).mean, latent_spectrum(pooled).mean)


def test_high_frequency_share_of_known_images():
    n = 32
    i = np.arange(n)
    low = np.cos(np.pi * (2 * i + 1) * 3 / (2 * n))[None, :, None, None] * np.ones((1, 1, n, 2))
    high = np.cos(np.pi * (2 * i + 1) * 20 / (2 * n))[None, None, :, None] * np.ones((1, n, 1, 2))
    share = high_frequency_share(np.concatenate([low, high, 5 + low + high, np.full_like(low, 4.0)]))
    np.testing.assert_allclose(share, [0, 1, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("height, width", [(96, 96), (48, 192), (192, 48)])
def test_white_noise_shares_by_area(height, width):
    """White noise has equal energy everywhere: the share is the area of the square outside the quarter disc, whatever
    the picture's own shape."""
    share = high_frequency_share(np.random.default_rng(3).normal(size=(4, height, width, 3)))
    np.testing.assert_allclose(share.mean(), 1 - np.pi * 0.5**2 / 4, atol=0.01)
