"""A random diffusers FluxTransformer2DModel, and ours with the same weights."""

import dataclasses
import math

import numpy as np
import pytest
import twins

from lwd_jax.backbones import flux
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.weights.model import abstract_params
from lwd_jax.weights.table import read

DEV = flux.Config(
    in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=40, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
SCHNELL = dataclasses.replace(DEV, guidance_embeds=False)


def foreign_model(config):
    """diffusers' model with every parameter moved away from its initial zeros and ones."""
    torch = pytest.importorskip("torch")
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(**flux.to_foreign(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def params_of(config, model):
    return read(flux.weights(config), twins.tensors_of(model), abstract_params(flux.BACKBONE, config))


def random_inputs(config, height, width, seed=1, batch=2, length=7):
    """(z_t, t, cond), of a latent of height x width."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    z_t, t = normal(batch, height, width, config.in_channels), rng.uniform(size=batch).astype(np.float32)
    tokens, pooled = normal(batch, length, config.joint_attention_dim), normal(batch, config.pooled_projection_dim)
    guidance = rng.uniform(1, 5, size=batch).astype(np.float32) if config.guidance_embeds else None
    # FLUX attends to padding, in diffusers and here: a mask of nothing changes nothing.
    return z_t, t, Conditioning(tokens, np.zeros((batch, length), np.float32), pooled, guidance)


def foreign_predict(model, z, t, cond):
    """diffusers' velocity for torch's z [B C h w], by its pipeline's own packing: [B C h w]."""
    import torch
    from diffusers import FluxPipeline

    batch, channels, height, width = z.shape
    arrays = (None if x is None else torch.from_numpy(x) for x in (cond.tokens, cond.pooled, cond.guidance))
    tokens, pooled, guidance = arrays
    out = model(
        hidden_states=FluxPipeline._pack_latents(z, batch, channels, height, width),
        timestep=torch.as_tensor(t),
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
    ).sample
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)


def foreign_call(model, z_t, t, cond):
    """The same arguments given to diffusers: (NCHW leaf tensor, NHWC output)."""
    import torch

    z = torch.from_numpy(z_t.transpose(0, 3, 1, 2).copy()).requires_grad_()
    return z, foreign_predict(model, z, t, cond).permute(0, 2, 3, 1)


def foreign_output(model, z_t, t, cond) -> np.ndarray:
    return foreign_call(model, z_t, t, cond)[1].detach().numpy()


def extend_foreign(monkeypatch, model, config, tokens: int) -> None:
    """Gives diffusers' model what its config cannot say: NTK per axis and the softmax scale sqrt(log_4608(tokens) / d).

    Its own tables and attention functions are used, with other arguments.
    """
    import torch
    from diffusers.models.embeddings import get_1d_rotary_pos_embed
    from diffusers.models.transformers import transformer_flux

    def tables(ids):
        factors = (1.0, *config.ntk)
        axes = [
            get_1d_rotary_pos_embed(
                size, ids[:, axis], theta=10000 * factors[axis], use_real=True, freqs_dtype=torch.float64
            )
            for axis, size in enumerate(config.axes_dims_rope)
        ]
        return tuple(torch.cat(parts, dim=-1) for parts in zip(*axes))

    attend = transformer_flux.dispatch_attention_fn
    scale = math.sqrt(math.log(tokens) / math.log(4608) / config.attention_head_dim)
    model.pos_embed.forward = tables
    if config.proportional_attention:
        replaced = lambda *args, **kwargs: attend(*args, **kwargs | {"scale": scale})  # noqa: E731
        monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", replaced)
