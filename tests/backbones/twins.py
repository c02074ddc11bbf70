"""A backbone at a small size, and diffusers' model of the same weights: what their comparisons have in common."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.weights.model import Model, abstract_params
from lwd_jax.weights.table import read, write


def tensors_of(model) -> dict:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def apart(ours, theirs, floor=0.0) -> float:
    """Relative error in the 2-norm; `floor` stands in for gradients that are 0 but for rounding."""
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), floor))


def foreign_class(backbone: Model):
    """diffusers' class of a backbone."""
    return getattr(pytest.importorskip("diffusers"), backbone.class_name)


@dataclasses.dataclass(frozen=True, eq=False)
class Twin:
    """One backbone at one size.

    Attributes:
      backbone: the family.
      config: its sizes.
      latent: height and width of the latent that it is tried on.
      predict: (diffusers' model, z_t [B C h w], t [B], Conditioning of arrays) -> velocity [B C h w], in torch.
    """

    backbone: Model
    config: Any
    latent: tuple[int, int]
    predict: Callable

    def module(self, **kinds):
        return self.backbone.build(self.config, **kinds)

    @property
    def rows(self):
        return self.backbone.rows(self.config)

    def abstract(self):
        return abstract_params(self.backbone, self.config)

    def foreign(self):
        """diffusers' model with every parameter moved away from its initial zeros and ones."""
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        model = foreign_class(self.backbone)(**self.backbone.to_foreign(self.config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def params(self, foreign):
        """Ours, with the weights of diffusers' model."""
        return read(self.rows, tensors_of(foreign), self.abstract())

    def inputs(self, seed=1, batch=2, length=7, latent=None):
        """Random (z_t, t, cond)."""
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return rng.standard_normal((batch, *shape)).astype(np.float32)

        config = self.config
        z_t, t = normal(*(latent or self.latent), config.in_channels), rng.uniform(size=batch).astype(np.float32)
        tokens, pooled = normal(length, config.joint_attention_dim), normal(config.pooled_projection_dim)
        told = getattr(config, "guidance_embeds", False)
        guidance = rng.uniform(1, 5, size=batch).astype(np.float32) if told else None
        # Both families attend to padding, in diffusers and here: a mask of nothing changes nothing.
        return z_t, t, Conditioning(tokens, np.zeros((batch, length), np.float32), pooled, guidance)

    def foreign_call(self, foreign, z_t, t, cond):
        """The same arguments given to diffusers: (NCHW leaf tensor, NHWC output)."""
        import torch

        z = torch.from_numpy(z_t.transpose(0, 3, 1, 2).copy()).requires_grad_()
        return z, self.predict(foreign, z, torch.from_numpy(t), cond).permute(0, 2, 3, 1)

    def foreign_output(self, foreign, z_t, t, cond) -> np.ndarray:
        return self.foreign_call(foreign, z_t, t, cond)[1].detach().numpy()

    @functools.cache
    def compiled(self, remat="none"):
        """(params, z_t, t, cond, weight) -> ((sum(output weight), output), its gradients by params and z_t)."""
        module = self.module(remat=remat)

        def loss(params, z_t, t, cond, weight):
            out = module.apply({"params": params}, z_t, t, cond)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def output(self, params, z_t, t, cond) -> np.ndarray:
        (_, out), _ = self.compiled()(params, z_t, t, cond, np.zeros_like(z_t))
        return np.asarray(out)

    def assert_gradients_equal(self, ours, foreign, bound: float = 1e-4) -> None:
        """Ours against those that torch has left on diffusers' parameters, each relative to its own length."""
        made = dict(write(self.rows, jax.device_get(ours)))
        theirs = {name: parameter.grad.numpy() for name, parameter in foreign.named_parameters()}
        typical = float(np.median([np.linalg.norm(gradient) for gradient in theirs.values()]))
        worst = max((apart(made[name], gradient, 1e-3 * typical), name) for name, gradient in theirs.items())
        assert worst[0] <= bound, worst
        for name in made.keys() - theirs.keys():  # a buffer of diffusers', as SD3's position table
            assert not np.any(made[name]), f"{name} is not trained"
