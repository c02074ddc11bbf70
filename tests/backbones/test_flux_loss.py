"""Law: the whole masked stage-2 loss through FLUX, and its gradients, are those of diffusers' model and of torch."""

import jax
import numpy as np
import pytest
from flux_twin import DEV, foreign_model, foreign_predict, params_of, random_inputs
from masked_loss import FLOOR, TIMES, masked_loss_by_torch
from twins import assert_gradients_equal

from lwd_jax.backbones import flux
from lwd_jax.config import Matching
from lwd_jax.objective.matching import matching_loss


def test_loss_and_gradients_equal_diffusers_and_torch():
    torch = pytest.importorskip("torch")
    model = foreign_model(DEV)
    z0, _, cond = random_inputs(DEV, 12, 20, batch=3)
    noise = np.random.default_rng(7).standard_normal(z0.shape).astype(np.float32)
    expected, mask = masked_loss_by_torch(torch, lambda z_t, t: foreign_predict(model, z_t, t, cond), z0, noise)
    expected.backward()
    fractions = mask.mean((1, 2, 3))
    assert fractions[0] == 1 and 0 < fractions[2] < fractions[1] < 1  # the mask has something to say

    def loss(params):
        def predict(z_t, t, cond):
            return flux.FLUX(DEV, remat="full").apply({"params": params}, z_t, t, cond)

        per_sample, metrics = matching_loss(predict, z0, cond, TIMES, noise, Matching(floor=FLOOR))
        return per_sample.mean(), metrics

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradients = compiled(params_of(DEV, model))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["supervised_fraction"], mask.mean().item(), rtol=1e-6)
    assert_gradients_equal(flux.weights(DEV), gradients, model)
