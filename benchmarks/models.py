"""What the benchmarks of a training step time: a backbone of any share of its blocks, its arguments, and the call of
diffusers' model of the same sizes.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch

from lwd_jax.backbones import flux, sd3
from lwd_jax.config import Config, load_config
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.weights.model import Model

GUIDANCE = 1.0  # told to FLUX.1-dev in training


class Family(NamedTuple):
    """One family of backbones.

    Attributes:
      model: its row in `lwd_jax.backbones`.
      predict: (diffusers' model, z_t [B C h w], t [B], tokens, pooled) -> velocity [B C h w].
      thinned: (Config, n) -> the Config with one in n of its blocks.
    """

    model: Model
    predict: Callable
    thinned: Callable


def _sd3(model, z_t, t, tokens, pooled):
    return model(z_t, tokens, pooled, 1000 * t, return_dict=False)[0]


def _thinner_sd3(config: sd3.Config, part: int) -> sd3.Config:
    depth = max(config.num_layers // part, 2)
    dual = min(config.dual_layers, depth - 1)  # the last block is never dual
    return dataclasses.replace(config, num_layers=depth, dual_layers=dual)


def _flux(model, z_t, t, tokens, pooled):
    pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    batch, channels, height, width = z_t.shape
    places = diffusers.FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, z_t.device, torch.float32)
    out = model(
        hidden_states=pack(z_t, batch, channels, height, width),
        timestep=t,
        guidance=torch.full_like(t, GUIDANCE) if model.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=z_t.device),
        img_ids=places,
        return_dict=False,
    )[0]
    return unpack(out, 8 * height, 8 * width, 8)


def _thinner_flux(config: flux.Config, part: int) -> flux.Config:
    blocks = {name: max(round(getattr(config, name) / part), 1) for name in ("num_layers", "num_single_layers")}
    return dataclasses.replace(config, **blocks)


FAMILIES = {
    "sd3": Family(sd3.BACKBONE, _sd3, _thinner_sd3),
    "flux": Family(flux.BACKBONE, _flux, _thinner_flux),
}


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark of a step has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--backbone", default="sd3", choices=FAMILIES)
    made.add_argument("--variant", help="of the backbone's sizes (default: the quickstart's)")
    made.add_argument("--part", type=int, default=1, help="one in so many of its blocks, where memory is short")
    made.add_argument("--resolution", type=int, default=256, help="px (default: %(default)s)")
    made.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--text", type=int, default=77, help="text tokens; SD3's are 333, FLUX's 512 (default: 77)")
    made.add_argument("--remat", default="none", choices=["none", "attention", "full"], help="PyTorch: none or full")
    made.add_argument("--repeats", type=int, default=10)
    made.add_argument("--compile", action="store_true", help="torch.compile the PyTorch model")
    return made


def chosen(args) -> tuple[Family, Any]:
    """The family and the sizes that the arguments name; `args.variant` is filled in.

    Raises:
      SystemExit: no such variant.
    """
    family = FAMILIES[args.backbone]
    args.variant = args.variant or {"sd3": "tiny", "flux": "flux-tiny"}[args.backbone]
    if args.variant not in family.model.variants:
        raise SystemExit(f"--variant {args.variant} is none of {', '.join(family.model.variants)}.")
    config = family.model.variants[args.variant]
    return family, config if args.part == 1 else family.thinned(config, args.part)


def title(args, config) -> str:
    blocks = config.num_layers + getattr(config, "num_single_layers", 0)
    return (
        f"{args.variant}, {blocks} blocks, {args.resolution} px, batch {args.batch}, {args.text} text tokens, "
        f"{args.dtype}, remat {args.remat}"
    )


def run_config(args, mask: str) -> Config:
    return load_config(
        {
            "stage": 2,
            "resolution": args.resolution,
            "dtype": args.dtype,
            "remat": args.remat,
            "models": {"backbone_variant": args.variant},
            "data": {"batch_size": args.batch},
            "matching": {"mask": mask, "guidance": GUIDANCE},
            "optimizer": {"warmup": 0},
            "training": {"ema": 0.0},
        }
    )


def random_batch(args, config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    side = args.resolution // config.latent_factor

    def normal(*shape):
        return rng.standard_normal((args.batch, *shape)).astype(np.float32)

    return {
        "mean": normal(side, side, config.in_channels),
        "std": np.full((args.batch, side, side, config.in_channels), 0.01, np.float32),
        "tokens": normal(args.text, config.joint_attention_dim),
        "token_mask": np.ones((args.batch, args.text), np.float32),
        "pooled": normal(config.pooled_projection_dim),
    }


def conditioning(batch, config) -> Conditioning:
    """The batch's, as the training step makes it."""
    told = np.full(len(batch["tokens"]), GUIDANCE, np.float32) if config.guidance_embeds else None
    return Conditioning(batch["tokens"], pooled=batch["pooled"], guidance=told)
