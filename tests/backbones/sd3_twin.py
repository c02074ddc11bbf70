"""A random diffusers SD3Transformer2DModel, and ours with the same weights."""

import numpy as np
import pytest

from lwd_jax.backbones import sd3
from lwd_jax.weights.model import abstract_params
from lwd_jax.weights.table import read, write

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


def tensors_of(model) -> dict:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def params_of(config, model):
    return read(sd3.weights(config), tensors_of(model), abstract_params(sd3.BACKBONE, config))


def foreign_call(model, z_t, t, cond):
    """The same arguments given to diffusers: (NCHW leaf tensor, NHWC output)."""
    import torch

    z = torch.from_numpy(z_t.transpose(0, 3, 1, 2).copy()).requires_grad_()
    out = model(z, torch.from_numpy(cond.tokens), torch.from_numpy(cond.pooled), torch.from_numpy(1000 * t)).sample
    return z, out.permute(0, 2, 3, 1)


def foreign_output(model, z_t, t, cond) -> np.ndarray:
    return foreign_call(model, z_t, t, cond)[1].detach().numpy()


def apart(ours, theirs, floor=0.0) -> float:
    """Relative error in the 2-norm; `floor` stands in for gradients that are 0 but for rounding."""
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), floor))


def assert_gradients_equal(config, ours, model, bound: float = 1e-4) -> None:
    """Ours against those that torch has left on the parameters of `model`, each relative to its own length."""
    made = dict(write(sd3.weights(config), ours))
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    typical = float(np.median([np.linalg.norm(gradient) for gradient in theirs.values()]))
    worst = max((apart(made[name], gradient, 1e-3 * typical), name) for name, gradient in theirs.items())
    assert worst[0] <= bound, worst
    assert not np.any(ours["position"]["table"]), "the position table is not trained"
