"""Models of a few thousand parameters, as folders and as workdirs, for the tests of what opens and writes them; and the
pictures, dataset and latents that they train on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lwd_jax.autoencoders import kl, save_autoencoder
from lwd_jax.backbones import flux, save_backbone, sd3
from lwd_jax.cli.encode import make_encoder
from lwd_jax.cli.mesh_flag import open_mesh
from lwd_jax.config import load_config, to_json
from lwd_jax.data.dataset import find_pictures, open_dataset, write_dataset
from lwd_jax.data.latents import Encoder, Plan, encode_dataset
from lwd_jax.data.text import TextEncoder, hashed_words
from lwd_jax.train.checkpoint import Checkpoints
from lwd_jax.train.models import AUTOENCODER, BACKBONE, Opened, describe
from lwd_jax.train.state import State
from lwd_jax.weights.model import abstract_params

KL = kl.Config(
    latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, scaling=1.7, shift=0.06
)
# For runs of several processes, each of which would else spend seconds on it.
SMALL_KL = kl.Config(latent_channels=4, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2)
SD3 = sd3.Config(
    sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=16, pos_embed_max_size=12,
)  # fmt: skip
FLUX = flux.Config(
    in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
MODELS = {kl.Config: kl.AUTOENCODER, sd3.Config: sd3.BACKBONE, flux.Config: flux.BACKBONE}
PIPELINES = {sd3.Config: "StableDiffusion3Pipeline", flux.Config: "FluxPipeline"}
TEXT = {"length": 9, "width": 24, "pooled": 16}


@dataclasses.dataclass(frozen=True)
class Formula:
    """A formula of all that a backbone is told, in place of one: for tests of what tells it. It has no parameters."""

    config: Any

    def apply(self, variables, z_t, t, cond):
        said = cond.tokens.mean((1, 2)) + cond.pooled.mean(1) + (0 if cond.guidance is None else cond.guidance)
        said, t = (x[:, None, None, None] for x in (said, t))
        return jnp.sin(said * z_t + t)


def random_params(model, config, seed: int):
    """Parameters of about unit gain everywhere: an initial backbone predicts 0, which would hide every mistake."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = str(path[-1].key)
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "kernel":
            fan_in = np.prod(leaf.shape[-2:-1]) * (9 if leaf.shape[:2] == (3, 3) else 1)
            return (noise / np.sqrt(fan_in)).astype(np.float32)
        if name == "table":
            return np.asarray(sd3.position_table(config), np.float32)
        return {"scale": 1 + np.float32(0.1) * noise, "bias": np.float32(0.1) * noise}[name]

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, abstract_params(model, config)))


def autoencoder(seed: int, sizes=KL):
    return kl.AUTOENCODER.build(sizes), random_params(kl.AUTOENCODER, sizes, seed)


def backbone(seed: int, sizes=SD3):
    model = MODELS[type(sizes)]
    return model.build(sizes), random_params(model, sizes, seed)


def write_pipeline(folder: Path, seed: int = 0, sizes=SD3, **scheduler) -> Path:
    """A diffusers pipeline folder without text encoders; `scheduler`: settings besides the shift of 2.5."""
    folder.mkdir(parents=True)
    save_autoencoder(folder / "vae", *autoencoder(seed))
    save_backbone(folder / "transformer", *backbone(seed + 1, sizes))
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 2.5,
    } | scheduler
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[type(sizes)]}))
    return folder


def write_workdir(
    folder: Path, stage: int, seed: int = 0, step: int = 7, text: bool = False, sizes=SD3, **fields
) -> Path:
    """A run that has ended: plain weights of `seed`, averaged ones of `seed + 100`; `text`: trained on hashed words.
    `sizes`: Config of the backbone.
    """
    kind, sizes = (AUTOENCODER, KL) if stage == 1 else (BACKBONE, sizes)
    model = MODELS[type(sizes)]
    config = load_config({"stage": stage, "name": f"run {seed}", "resolution": 64, **fields})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    module = model.build(sizes)
    extra = {"text": hashed_words(None, **TEXT).describe()} if text else {}
    (folder / "model.json").write_text(describe(kind, Opened(model, module, None), extra))
    average = random_params(model, sizes, seed + 100) if config.training.ema else {}
    zero = jnp.zeros((), jnp.int32)
    state = State(jnp.asarray(step, jnp.int32), random_params(model, sizes, seed), {}, average, zero, zero)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(state, {}, config)
    checkpoints.finish(step)
    checkpoints.close()
    lines = [{"step": n, "loss": 1 / n, "loss_detail": 2 / n, "loss_smooth": 0.5 / n} for n in range(1, step + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def quiet(*_):
    """For what reports its progress."""


def write_data(root: Path, pictures, captions, encoder: Encoder, text: TextEncoder, plan: Plan) -> None:
    """Folders `images`, `dataset` and `latents`.

    Args:
      pictures: uint8 [H W 3] each.
      captions: alternatives of each.
      encoder, text, plan: of the latents.
    """
    (root / "images").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / "images" / f"{number:02}.png")
    write_dataset(root / "dataset", root / "images", find_pictures(root / "images"), captions, quiet)
    encode_dataset(open_dataset(root / "dataset"), root / "latents", encoder, text, plan, quiet)


def write_inputs(root: Path) -> None:
    """What a run of either stage at 32 px starts from: `write_data` of nine pictures of noise with a caption each, and
    the models, `vae` (which made the latents) and `transformer`, of seed 0.
    """
    save_autoencoder(root / "vae", *autoencoder(0))
    save_backbone(root / "transformer", *backbone(0))
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(9)]
    captions = [(f"picture {number}",) for number in range(9)]
    plan = Plan(resolution=32, keep_aspect=False, smallest_bucket=1)
    write_data(
        root,
        pictures,
        captions,
        make_encoder(*autoencoder(0), open_mesh("4,1,1,1", 4)),
        hashed_words(None, **TEXT),
        plan,
    )
