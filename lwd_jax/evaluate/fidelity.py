"""How near a picture is to the one it should equal: PSNR and SSIM through scikit-image. Paired; no network."""

import numpy as np
from skimage import metrics


def psnr(reference: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """[B] peak signal-to-noise ratio in dB of uint8 pictures [B H W 3], range 255; infinite where they are equal."""
    with np.errstate(divide="ignore"):  # equal pictures: infinity is the answer, not a mishap
        pairs = zip(reference, picture, strict=True)
        return np.array([metrics.peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs])


def ssim(reference: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """[B] structural similarity in [-1, 1] of uint8 pictures [B H W 3], 7 x 7 windows, mean over the channels."""
    pairs = zip(reference, picture, strict=True)
    return np.array([metrics.structural_similarity(a, b, data_range=255, channel_axis=-1) for a, b in pairs])
