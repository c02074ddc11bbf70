"""A random diffusers SD3Transformer2DModel, and ours with the same weights."""

import numpy as np
import pytest
import twins

from lwd_jax.backbones import sd3
from lwd_jax.weights.model import abstract_params
from lwd_jax.weights.table import read

PLAIN = sd3.Config(
    sample_size=32, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=40, pooled_projection_dim=24, pos_embed_max_size=10,
)  # fmt: skip


def foreign_model(config):
    """diffusers' model with every parameter moved away from its initial zeros and ones."""
    torch = pytest.importorskip("torch")
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(**sd3.to_foreign(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def params_of(config, model):
    return read(sd3.weights(config), twins.tensors_of(model), abstract_params(sd3.BACKBONE, config))


def foreign_call(model, z_t, t, cond):
    """The same arguments given to diffusers: (NCHW leaf tensor, NHWC output)."""
    import torch

    z = torch.from_numpy(z_t.transpose(0, 3, 1, 2).copy()).requires_grad_()
    out = model(z, torch.from_numpy(cond.tokens), torch.from_numpy(cond.pooled), torch.from_numpy(1000 * t)).sample
    return z, out.permute(0, 2, 3, 1)


def foreign_output(model, z_t, t, cond) -> np.ndarray:
    return foreign_call(model, z_t, t, cond)[1].detach().numpy()


def assert_gradients_equal(config, ours, model) -> None:
    """See `twins.assert_gradients_equal`."""
    twins.assert_gradients_equal(sd3.weights(config), ours, model)
    assert not np.any(ours["position"]["table"]), "the position table is not trained"
