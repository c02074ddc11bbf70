"""FLUX at small sizes, and diffusers' FluxTransformer2DModel."""

import dataclasses
import math

from twins import Twin

from lwd_jax.backbones import flux

SIZES = flux.Config(
    in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=40, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
)  # fmt: skip


def foreign_predict(model, z, t, cond):
    """See `Twin.predict`; by diffusers' pipeline's own packing."""
    import torch
    from diffusers import FluxPipeline

    batch, channels, height, width = z.shape
    arrays = (None if x is None else torch.from_numpy(x) for x in (cond.tokens, cond.pooled, cond.guidance))
    tokens, pooled, guidance = arrays
    out = model(
        hidden_states=FluxPipeline._pack_latents(z, batch, channels, height, width),
        timestep=t,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
    ).sample
    return FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)


def twin(latent=(10, 6), **changes) -> Twin:
    return Twin(flux.BACKBONE, dataclasses.replace(SIZES, **changes), latent, foreign_predict)


DEV = twin()  # 5 x 3 tokens
SCHNELL = twin((6, 14), guidance_embeds=False)  # 3 x 7


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
