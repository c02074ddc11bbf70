"""The programs of a run - train step, encode, sample, decode - from its config alone: shapes with layouts, and what is
compiled of them. Of the models only the descriptions are read; no weight is.

The train step is the one that `lwd train` runs, over the whole mesh. Encode, sample and decode are planned over the
same mesh too, one picture for each place along (data, fsdp), its rows over `context`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lwd_jax.config import Adapter, Config
from lwd_jax.data.latents import make_posterior, open_latents
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.nn.platform import for_platform
from lwd_jax.objective import lpips
from lwd_jax.parallel.mesh import abstract_mesh, batch_parts, make_mesh, mesh_shape
from lwd_jax.parallel.rules import batch_shardings, param_shardings, replicated
from lwd_jax.plan.count import Operations, operations
from lwd_jax.plan.flops import TRAINING, backbone_forward
from lwd_jax.plan.topology import Topology
from lwd_jax.train.models import AUTOENCODER, BACKBONE, Opened, open_autoencoder, open_model, open_trained
from lwd_jax.train.program import Stage, abstract_state, build_program, trained_paths
from lwd_jax.train.setup import stage_of
from lwd_jax.train.state import merge, split

OF_STAGE = {1: ("train", "encode", "decode"), 2: ("train", "encode", "sample", "decode")}


class Makers(NamedTuple):
    """What samples and decodes, handed in: planning and sampling do not know each other.

    Attributes:
      sampler: (backbone module, solver) -> jitted (params, noise, cond, null_cond, guidance, sigmas) -> z0.
      decoder: autoencoder module -> jitted (params, z0) -> pictures.
    """

    sampler: Callable
    decoder: Callable


class Planned(NamedTuple):
    """One program.

    Attributes:
      name: of OF_STAGE.
      pictures: in one run of it.
      arguments: ShapeDtypeStructs with shardings: what lies in memory between its runs.
      lower: () -> jax.stages.Lowered.
      count: () -> the operations of one run, whatever is recomputed included.
      model: () -> FLOPs of one run that the model's mathematics asks for, nothing recomputed.
    """

    name: str
    pictures: int
    arguments: Any
    lower: Callable[[], Any]
    count: Callable[[], Operations]
    model: Callable[[], float]


class Plans(NamedTuple):
    """What the programs are made of: a run, the mesh (an AbstractMesh where nothing is to be compiled), the platform it
    is compiled for, and Makers.
    """

    config: Config
    mesh: Any
    platform: str
    makers: Makers

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Where a program is traced: attention takes the kernel of the platform, not of this machine."""
        with for_platform(self.platform):
            yield

    @contextlib.contextmanager
    def traced_on_mesh(self) -> Iterator[None]:
        """The same, with the mesh as the ambient one: the train step sets it by itself."""
        with self.traced(), jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield

    def batch(self, shapes: dict[str, tuple], dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """Batches of the given shapes, with layouts."""
        plain = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
        return placed(plain, batch_shardings(plain, self.mesh))


def placed(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with those shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def unplaced(tree: Any) -> Any:
    """ShapeDtypeStructs without shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def text_tokens(config: Config, sizes: Any) -> int:
    """Text tokens of a caption: of the run's latents, or the backbone's where no latents are named yet."""
    return open_latents(config.data.latents).metadata["text"]["length"] if config.data.latents else sizes.text_tokens


# --------------------------------------------------------------------------------------------------------- train step


def _abstract_lpips() -> Partial:
    """LPIPS with the shapes of its weights: they need not be installed."""
    sizes = lpips.shapes()
    return Partial(lpips.distance, {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()})


def abstract_stage(config: Config) -> Stage:
    """The stage of a config; of its weights only the shapes."""
    if config.stage == 1:
        perceptual = _abstract_lpips() if config.reconstruction.lpips else None
        return stage_of(config, open_trained(config), None, 0, perceptual)
    opened = open_trained(config)
    tokens = text_tokens(config, opened.module.config)
    return stage_of(config, opened, open_autoencoder(config).module.config, tokens, None)


def gradient_operations(config: Config, stage: Stage, abstract_params: Any) -> Operations:
    """Of the gradient of a stage's loss for one batch; the optimizer has no products to speak of."""
    trained = trained_paths(stage, config, abstract_params)
    trainable, frozen = split(unplaced(abstract_params), trained)
    pictures = config.data.batch_size
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), pictures))
    loss = stage.loss if isinstance(stage.loss, Partial) else Partial(stage.loss)

    def gradient(loss, trainable, frozen, batch, keys):
        return jax.grad(lambda moved: loss(merge(frozen, moved), batch, keys)[0])(trainable)

    return operations(gradient, loss, trainable, frozen, unplaced(stage.batch), keys)


def spared(config: Config) -> float:
    """FLOPs of one train step that adapters need less than training whole: gradients by the frozen weights, beside
    which their own are few. Counted of both; what a kernel repeats and pads is in both, and falls out."""
    if config.adapter.kind == "none":
        return 0.0

    def counted(config: Config) -> float:
        plain = dataclasses.replace(config, remat="none")
        stage = abstract_stage(plain)
        return gradient_operations(plain, stage, abstract_state(plain, stage).params).total

    return counted(dataclasses.replace(config, adapter=Adapter())) - counted(config)


def _train(plans: Plans) -> Planned:
    config = plans.config
    stage = abstract_stage(config)
    program = build_program(config, plans.mesh, stage)

    def lower():
        with plans.traced():
            return program.step.lower(program.state, program.batch, jax.eval_shape(lambda: jax.random.key(0)))

    def count():
        with plans.traced():
            return gradient_operations(config, stage, program.state.params)

    def model():
        if config.stage == 2:
            backbone = open_trained(config).module.config
            side = stage.batch["mean"].shape[1]
            each = backbone_forward(backbone, side, side, stage.batch["tokens"].shape[1])
            return TRAINING * config.data.batch_size * each - spared(config)
        plain = dataclasses.replace(config, remat="none")
        with plans.traced():
            return gradient_operations(plain, abstract_stage(plain), program.state.params).total

    arguments = (program.state, program.batch)
    return Planned("train", config.data.batch_size, arguments, lower, count, model)


# ------------------------------------------------------------------------------------- what runs a model forward only


def _forward(plans: Plans, name: str, jitted: Callable, arguments: tuple, model: Callable | None = None) -> Planned:
    def lower():
        with plans.traced_on_mesh():
            return jitted.lower(*arguments)

    def count():
        with plans.traced():
            return operations(jitted, *unplaced(arguments))

    wanted = model or (lambda: count().total)
    return Planned(name, batch_parts(plans.mesh), arguments, lower, count, wanted)


def _autoencoder(config: Config, param_dtype) -> Opened:
    models = config.models
    return open_model(
        AUTOENCODER,
        models.autoencoder,
        models.autoencoder_variant,
        ema=models.ema,
        dtype=jnp.dtype(config.dtype),
        param_dtype=param_dtype,
    )


def _encode(plans: Plans) -> Planned:
    """As `lwd encode --dtype` with the config's dtype."""
    opened = _autoencoder(plans.config, jnp.float32)
    side = plans.config.resolution
    pictures = plans.batch({"x": (batch_parts(plans.mesh), side, side, 3)}, jnp.uint8)["x"]
    return _forward(plans, "encode", make_posterior(opened.module), (_whole(plans, opened), pictures))


def _whole(plans: Plans, opened: Opened) -> Any:
    """An autoencoder's parameters, on every chip: they are small."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(plans.mesh)), opened.abstract()
    )


def _decode(plans: Plans) -> Planned:
    """As `lwd sample` decodes: parameters and arithmetic in the config's dtype."""
    opened = _autoencoder(plans.config, jnp.dtype(plans.config.dtype))
    sizes = opened.module.config
    side = plans.config.resolution // sizes.factor
    z0 = plans.batch({"z0": (batch_parts(plans.mesh), side, side, sizes.latent_channels)})["z0"]
    return _forward(plans, "decode", plans.makers.decoder(opened.module), (_whole(plans, opened), z0))


def _sample(plans: Plans) -> Planned:
    """All solver steps of `lwd sample`; parameters, in the config's dtype, lie as the train step's do."""
    config, sampling = plans.config, plans.config.sampling
    kind = jnp.dtype(config.dtype)
    opened = open_model(
        BACKBONE, config.models.backbone, config.models.backbone_variant, ema=config.models.ema, dtype=kind,
        param_dtype=kind,
    )  # fmt: skip
    sizes, size = opened.module.config, batch_parts(plans.mesh)
    length, side = text_tokens(config, sizes), config.resolution // sizes.latent_factor
    text = {"tokens": (size, length, sizes.joint_attention_dim), "mask": (size, length)}
    told = {"guidance": (size,)} if sizes.guidance_embeds else {}
    cond = Conditioning(**plans.batch(text | told | {"pooled": (size, sizes.pooled_projection_dim)}))
    noise = plans.batch({"noise": (size, side, side, sizes.in_channels)})["noise"]
    scalar, levels = ((), (sampling.steps + 1,))
    small = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(plans.mesh)) for shape in (scalar, levels)]
    params = opened.abstract()
    null = cond if sampling.guidance > 1 else None
    arguments = (placed(params, param_shardings(params, plans.mesh)), noise, cond, null, *small)

    def model():
        runs = {"euler": sampling.steps, "heun": 2 * sampling.steps - 1}[sampling.solver] * (2 if null else 1)
        return float(size * runs * backbone_forward(sizes, side, side, length))

    return _forward(plans, "sample", plans.makers.sampler(opened.module, sampling.solver), arguments, model)


_BUILD = {"train": _train, "encode": _encode, "sample": _sample, "decode": _decode}


def names_of(stage: int, program: str) -> tuple[str, ...]:
    """The programs that a word means: one of them; "sample", which decodes too; or "all".

    Raises:
      UserError: a run of that stage has no such program.
    """
    if program == "all":
        return OF_STAGE[stage]
    if program not in OF_STAGE[stage]:
        raise UserError(f"A run of stage {stage} has no program '{program}': it trains no backbone to sample from.")
    return ("sample", "decode") if program == "sample" else (program,)


def mesh_of(config: Config, topology: Topology) -> Any:
    """The run's mesh on a topology; an AbstractMesh where there are no devices to compile for.

    Raises:
      UserError: the mesh does not fit the number of chips.
    """
    if topology.devices is not None:
        return make_mesh(config.mesh, topology.devices)
    return abstract_mesh(mesh_shape(config.mesh, topology.size))


def planned(config: Config, mesh: Any, platform: str, makers: Makers, name: str) -> Planned:
    """One program of a run; nothing is compiled yet.

    Raises:
      UserError: sizes that do not divide over the mesh, models that do not fit each other.
    """
    return _BUILD[name](Plans(config, mesh, platform, makers))
