"""The stage-2 loss in torch: the equations of arXiv 2506.00433, channels first."""

import numpy as np

TIMES = np.array([0.25, 0.55, 0.9], np.float32)  # all supervised, some, few
FLOOR = 0.3


def masked_loss_by_torch(torch, predict, z0, noise):
    """(loss, mask) of NHWC latents, one of each of TIMES; predict: (z_t [B C h w], t [B]) -> velocity [B C h w]."""
    z0, noise = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (z0, noise))
    t = torch.from_numpy(TIMES)
    sigma = t[:, None, None, None]
    a, b, c, d = z0[..., ::2, ::2], z0[..., ::2, 1::2], z0[..., 1::2, ::2], z0[..., 1::2, 1::2]
    details = ((a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2)
    energy = sum(band**2 for band in details).mean(1, keepdim=True)
    energy = torch.nn.functional.interpolate(energy, scale_factor=2, mode="bilinear", align_corners=False)
    low, high = energy.amin((1, 2, 3), keepdim=True), energy.amax((1, 2, 3), keepdim=True)
    mask = ((energy - low) / (high - low + 1e-8) + FLOOR >= sigma).float()
    z_t = (1 - sigma) * z0 + sigma * noise
    return ((mask * (predict(z_t, t) - (noise - z0))) ** 2).mean(), mask
