"""SD3 at small sizes, and diffusers' SD3Transformer2DModel."""

import dataclasses

from twins import Twin

from lwd_jax.backbones import sd3

SIZES = sd3.Config(
    sample_size=32, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=40, pooled_projection_dim=24, pos_embed_max_size=10,
)  # fmt: skip


def foreign_predict(model, z, t, cond):
    """See `Twin.predict`."""
    import torch

    return model(z, torch.from_numpy(cond.tokens), torch.from_numpy(cond.pooled), 1000 * t).sample


def twin(latent=(12, 12), **changes) -> Twin:
    return Twin(sd3.BACKBONE, dataclasses.replace(SIZES, **changes), latent, foreign_predict)


PLAIN = twin()
PORTRAIT = twin((20, 6), qk_norm=True)
DUAL = twin((6, 14), qk_norm=True, dual_layers=2)
