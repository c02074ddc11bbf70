"""Law: the whole masked stage-2 loss through a backbone, and its gradients, are those of diffusers' model and of torch,
by the equations of arXiv 2506.00433, channels first."""

import flux_twin
import jax
import numpy as np
import pytest
import sd3_twin

from lwd_jax.config import Matching
from lwd_jax.objective.matching import matching_loss

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


@pytest.mark.parametrize(
    ("twin", "latent"), [(sd3_twin.PLAIN, (12, 16)), (flux_twin.DEV, (12, 20))], ids=["SD3", "FLUX"]
)
def test_loss_and_gradients_equal_diffusers_and_torch(twin, latent):
    torch = pytest.importorskip("torch")
    model = twin.foreign()
    z0, _, cond = twin.inputs(batch=3, latent=latent)
    noise = np.random.default_rng(7).standard_normal(z0.shape).astype(np.float32)
    expected, mask = masked_loss_by_torch(torch, lambda z_t, t: twin.predict(model, z_t, t, cond), z0, noise)
    expected.backward()
    fractions = mask.mean((1, 2, 3))
    assert fractions[0] == 1 and 0 < fractions[2] < fractions[1] < 1  # the mask has something to say

    def loss(params):
        def predict(z_t, t, cond):
            return twin.module(remat="full").apply({"params": params}, z_t, t, cond)

        per_sample, metrics = matching_loss(predict, z0, cond, TIMES, noise, Matching(floor=FLOOR))
        return per_sample.mean(), metrics

    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(twin.params(model))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["supervised_fraction"], mask.mean().item(), rtol=1e-6)
    twin.assert_gradients_equal(gradients, model)
