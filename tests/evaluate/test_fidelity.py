"""PSNR against its formula; SSIM's fixed points."""

import numpy as np
import pytest

from lwd_jax.evaluate.fidelity import psnr, ssim


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 21, 34, 3), np.uint8)


def test_psnr_is_its_formula_on_range_255(pictures):
    other = np.clip(pictures.astype(int) + np.array([1, 4, 16]).reshape(3, 1, 1, 1), 0, 255).astype(np.uint8)
    error = ((pictures.astype(float) - other) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(psnr(pictures, other), 10 * np.log10(255**2 / error))


def test_equal_pictures(pictures):
    assert np.isinf(psnr(pictures, pictures)).all()
    np.testing.assert_allclose(ssim(pictures, pictures), 1)


def test_ssim_falls_with_noise(pictures):
    smooth = np.broadcast_to(np.arange(34, dtype=np.uint8)[None, None, :, None] * 6, pictures.shape)
    noise = np.random.default_rng(1).integers(-40, 40, pictures.shape)
    little, much = (np.clip(smooth + noise * k, 0, 255).astype(np.uint8) for k in (0.2, 1))
    assert (ssim(smooth, little) > ssim(smooth, much)).all()


def test_pairs_must_match(pictures):
    with pytest.raises(ValueError):
        psnr(pictures, pictures[:2])
