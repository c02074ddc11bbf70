"""Law: the whole masked stage-2 loss through SD3, and its gradients, are those of diffusers' model and of torch."""

import jax
import numpy as np
import pytest
from masked_loss import FLOOR, TIMES, masked_loss_by_torch
from sd3_twin import PLAIN, assert_gradients_equal, foreign_model, params_of

from lwd_jax.backbones import sd3
from lwd_jax.config import Matching
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.objective.matching import matching_loss


def test_loss_and_gradients_equal_diffusers_and_torch():
    torch = pytest.importorskip("torch")
    model = foreign_model(PLAIN)
    rng = np.random.default_rng(7)
    z0, noise = rng.standard_normal((2, 3, 12, 16, PLAIN.in_channels)).astype(np.float32)
    tokens = rng.standard_normal((3, 7, PLAIN.joint_attention_dim)).astype(np.float32)
    pooled = rng.standard_normal((3, PLAIN.pooled_projection_dim)).astype(np.float32)

    def predict(z_t, t):
        return model(z_t, torch.from_numpy(tokens), torch.from_numpy(pooled), 1000 * t).sample

    expected, mask = masked_loss_by_torch(torch, predict, z0, noise)
    expected.backward()
    fractions = mask.mean((1, 2, 3))
    assert fractions[0] == 1 and 0 < fractions[2] < fractions[1] < 1  # the mask has something to say

    def loss(params):
        def predict(z_t, t, cond):
            return sd3.SD3(PLAIN, remat="full").apply({"params": params}, z_t, t, cond)

        cond = Conditioning(tokens, pooled=pooled)
        per_sample, metrics = matching_loss(predict, z0, cond, TIMES, noise, Matching(floor=FLOOR))
        return per_sample.mean(), metrics

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradients = compiled(params_of(PLAIN, model))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["supervised_fraction"], mask.mean().item(), rtol=1e-6)
    assert_gradients_equal(PLAIN, gradients, model)
