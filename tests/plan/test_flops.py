"""Law: FLOPs by formula are those that torch counts in diffusers' model, but for what comes to nothing there."""

import dataclasses
import functools

import pytest

from lwd_jax.backbones import flux, sd3
from lwd_jax.plan.flops import TRAINING, backbone_forward, flux_forward, sd3_forward


@functools.cache
def foreign(name, config):
    """diffusers' model without values, of the class of that name."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    family = sd3 if isinstance(config, sd3.Config) else flux
    with torch.device("meta"):
        return getattr(diffusers, name)(**family.to_foreign(config))


@pytest.mark.parametrize("variant", ["sd3-medium", "sd3.5-medium", "sd3.5-large", "tiny"])
@pytest.mark.parametrize(
    ("height", "width", "text", "blocks"),
    [(64, 64, 333, None), (48, 32, 77, 3), pytest.param(48, 32, 77, None, marks=pytest.mark.heavy)],
)
def test_sd3_forward_is_torchs_count(variant, height, width, text, blocks):
    """At its own number of blocks, and with few of them at another size."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    config = sd3.VARIANTS[variant]
    if blocks is not None:
        config = dataclasses.replace(config, num_layers=blocks, dual_layers=min(config.dual_layers, blocks - 1))
    model = foreign("SD3Transformer2DModel", config)
    height, width = (min(size, 2 * config.pos_embed_max_size) for size in (height, width))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latent, tokens = torch.empty(1, 16, height, width), torch.empty(1, text, config.joint_attention_dim)
        model(latent, tokens, torch.empty(1, config.pooled_projection_dim), torch.empty(1))
    # diffusers computes the text's queries of the last block and what they attend to, and drops it.
    dropped = 2 * text * config.width**2 + 4 * text * (height * width // 4 + text) * config.width
    assert sd3_forward(config, height, width, text) == counter.get_total_flops() - dropped


def test_figures_of_a_training_step():
    """SD3-medium at 1024 and 4096 px: 26.8 and 2190 TFLOP a picture."""
    medium = sd3.VARIANTS["sd3-medium"]
    assert TRAINING * sd3_forward(medium, 128, 128, 333) == pytest.approx(26.8e12, rel=0.01)
    assert TRAINING * sd3_forward(medium, 512, 512, 333) == pytest.approx(2190e12, rel=0.02)


@pytest.mark.parametrize("variant", flux.VARIANTS)
def test_flux_forward_is_torchs_count(variant):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    config, (height, width, text) = flux.VARIANTS[variant], (48, 32, 77)
    model = foreign("FluxTransformer2DModel", config)
    picture, empty = height * width // 4, torch.empty
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            empty(1, picture, 64), empty(1, text, config.joint_attention_dim),
            empty(1, config.pooled_projection_dim), empty(1), torch.zeros(picture, 3), torch.zeros(text, 3),
            guidance=empty(1) if config.guidance_embeds else None,
        )  # fmt: skip
    assert backbone_forward(config, height, width, text) == counter.get_total_flops()


@pytest.mark.parametrize(("px", "teraflops"), [(1024, 223), (2048, 1254), (4096, 11725)])
def test_figures_of_a_training_step_of_flux(px, teraflops):
    dev = flux.VARIANTS["flux-dev"]
    assert TRAINING * flux_forward(dev, px // 8, px // 8, 512) == pytest.approx(teraflops * 1e12, rel=0.003)
