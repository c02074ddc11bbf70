"""From a config to everything the loop takes: models opened and checked against the data, stage, program, batches."""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lwd_jax.adapters.factors import frozen, merged
from lwd_jax.autoencoders.kl import Posterior, scale
from lwd_jax.config import Config
from lwd_jax.data.batches import Batches, make_batches
from lwd_jax.data.latents import Latents, check_autoencoder, check_text, open_latents
from lwd_jax.errors import UserError
from lwd_jax.objective.lpips import load_lpips
from lwd_jax.objective.matching import draw_times, matching_loss
from lwd_jax.objective.reconstruction import reconstruction_loss
from lwd_jax.parallel.mesh import make_mesh, process_share
from lwd_jax.parallel.rules import param_shardings, replicated
from lwd_jax.train.models import TRAINED, Opened, describe, open_autoencoder, open_trained
from lwd_jax.train.program import Program, Stage, autoencoder_stage, backbone_stage, build_program
from lwd_jax.weights.folder import fingerprint

SHARED = "/dev/shm"
IN_FLIGHT = 4  # batches of each data worker that are there at once; measured


class Setup(NamedTuple):
    """What one run is made of.

    Attributes:
      mesh, program: to hand to the loop.
      opened: the model that is trained.
      autoencoder: stage 2, (module, parameters on the mesh) that its latents decode with; None in stage 1.
      params: reads the parameters to start from onto the mesh; None = random ones.
      batches: the training batches, at their beginning.
      description: the text of the workdir's model.json.
    """

    mesh: Mesh
    program: Program
    opened: Opened
    autoencoder: tuple | None
    params: Callable[[], Any] | None
    batches: Batches
    description: str


def stage_of(config: Config, opened: Opened, autoencoder: Any, tokens: int, perceptual: Callable | None) -> Stage:
    """The stage of a config; reads nothing, so that it serves shape evaluation too.

    Args:
      config: of the run.
      opened: the model that is trained (`open_trained`).
      autoencoder: stage 2, the autoencoder's Config: the latent's size and scale.
      tokens: stage 2, text tokens per caption.
      perceptual: stage 1, (x, y) -> [B].
    """
    if config.stage == 1:
        return autoencoder_stage(config, opened.module, opened.init, perceptual)
    side = config.resolution // autoencoder.factor
    latent = (side, side, autoencoder.latent_channels)
    if opened.module.config.in_channels != autoencoder.latent_channels:
        raise UserError(
            f"The backbone reads latents of {opened.module.config.in_channels} channels, but the autoencoder makes "
            f"{autoencoder.latent_channels}."
        )
    if config.matching.guidance != 1 and not opened.module.config.guidance_embeds:
        raise UserError(
            f"matching.guidance is {config.matching.guidance}, but this {opened.model.class_name} is told no guidance "
            "scale; remove it."
        )
    init = opened.init if config.adapter.kind == "none" else opened.init_frozen
    return backbone_stage(config, opened.module, init, functools.partial(scale, autoencoder), latent, tokens)


def _checked_latents(config: Config, opened: Opened, mesh: Mesh) -> tuple[Latents, tuple]:
    """(latents, (autoencoder module, parameters)), which belong to each other and to the backbone. The parameters are
    whole on every device of the mesh, which decodes previews together.
    """
    if not config.data.latents:
        raise UserError("Stage 2 reads latents: set data.latents to a folder made by lwd encode.")
    if not config.models.autoencoder:
        raise UserError(
            "Stage 2 must know which autoencoder its latents decode with: set models.autoencoder to the folder or "
            "workdir that lwd encode was given as --models."
        )
    latents = open_latents(config.data.latents)
    check_text(latents, opened.module.config.joint_attention_dim, opened.module.config.pooled_projection_dim)
    autoencoder = open_autoencoder(config)
    params = autoencoder.params(functools.partial(jax.tree.map, lambda _: replicated(mesh)))
    check_autoencoder(latents, fingerprint(params))
    return latents, (autoencoder.module, params)


def check_objective(config: Config, model: Any, autoencoder: Any, shapes: list[tuple[int, int]]) -> None:
    """Evaluates the objective by shape, with the simplest of models, on every shape that batches come in: so that a
    setting that it refuses is told before weights are read, and not when the first batch of that shape comes.

    Args:
      config: of the run.
      model: the Config of what trains.
      autoencoder: that of the autoencoder, the same in stage 1.
      shapes: (height, width) of the pictures, px.

    Raises:
      UserError: an unknown mask, saliency, wavelet, time sampler or weighting, or one of its parameters out of range; a
        scale that does not divide a latent.
    """

    factor = autoencoder.factor

    def encode(x):
        z = jnp.zeros((1, x.shape[1] // factor, x.shape[2] // factor, autoencoder.latent_channels))
        return Posterior(z, z)

    def stage1(x, key):
        def decode(z):
            return jnp.zeros((1, z.shape[1] * factor, z.shape[2] * factor, 3))

        rule = dataclasses.replace(config.reconstruction, lpips=0.0)
        return reconstruction_loss(encode, decode, x, key, rule, None)

    def stage2(x, key):
        z = encode(x).mean
        t = draw_times(key, 1, config.matching, z.shape[1] * z.shape[2] // model.patch_size**2)
        return matching_loss(lambda z_t, t, cond: z_t, z, None, t, z, config.matching)

    key = jax.eval_shape(lambda: jax.random.key(0))
    for height, width in shapes:
        picture = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        jax.eval_shape({1: stage1, 2: stage2}[config.stage], picture, key)


def check_shared_memory(config: Config, batch: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Checks that data workers can hand their batches over: a container's /dev/shm has 64 MB if nothing else is said,
    and a worker that finds it full is ended by the system without a word.

    Args:
      config: of the run.
      batch: of all processes.

    Raises:
      UserError: there is too little of it.
    """
    if not config.data.workers or not os.path.isdir(SHARED):
        return
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in batch.values()) / jax.process_count()
    needed, free = IN_FLIGHT * config.data.workers * size, shutil.disk_usage(SHARED).free
    if free < needed:
        raise UserError(
            f"data.workers={config.data.workers} hand batches over in {SHARED}, which has {free / 1e6:.0f} MB free, "
            f"but need up to {needed / 1e6:.0f} MB: give the container more (docker run --shm-size; on Kubernetes an "
            "emptyDir of medium Memory), or set data.workers=0."
        )


def _reader(config: Config, opened: Opened, program: Program, mesh: Mesh) -> Callable[[], Any] | None:
    """What reads the parameters to start from onto the mesh, in the dtypes of the state: what trains is not rounded to
    param_dtype. Under new adapters those of earlier runs stay beside their kernels, otherwise they are merged into
    them. None = random parameters."""
    if opened.params is None:
        return None
    simplify = merged if config.adapter.kind == "none" else frozen
    return lambda: simplify(opened.params(functools.partial(param_shardings, mesh=mesh), program.state.params))


def make_setup(config: Config, devices=None) -> Setup:
    """Opens and checks everything a run needs, before anything is written.

    Raises:
      UserError: whatever is missing or does not fit: models, data, sizes, settings, and which.
    """
    mesh = make_mesh(config.mesh, devices)
    opened = open_trained(config)
    if config.adapter.kind != "none" and opened.params is None:
        raise UserError("Adapters train over a base that they are kept apart from: set models.backbone to its folder.")
    autoencoder, perceptual, sizes, tokens, extra = None, None, None, 0, {}
    if config.stage == 2:
        latents, autoencoder = _checked_latents(config, opened, mesh)
        sizes, tokens = autoencoder[0].config, latents.metadata["text"]["length"]
        extra = {name: latents.metadata[name] for name in ("autoencoder_fingerprint", "text")}
    elif config.reconstruction.lpips:
        perceptual = load_lpips()
    program = build_program(config, mesh, stage_of(config, opened, sizes, tokens, perceptual))
    check_shared_memory(config, program.batch)
    if config.adapter.kind != "none":
        extra["base"] = {"path": config.models.backbone, "fingerprint": opened.fingerprint()}
    share = process_share(mesh)
    batches = make_batches(config, process_index=share.index, blocks=share.blocks)
    model = opened.module.config
    check_objective(config, model, sizes or model, batches.shapes)
    description = describe(TRAINED[config.stage], opened, extra)
    return Setup(mesh, program, opened, autoencoder, _reader(config, opened, program, mesh), batches, description)
