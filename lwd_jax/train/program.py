"""Where model, objective and mesh meet: the two stages as losses, and the compiled program of one of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.tree_util import Partial

from lwd_jax.adapters import attach
from lwd_jax.adapters.dropout import dropout, streams
from lwd_jax.adapters.factors import is_factor, trainable
from lwd_jax.config import Config
from lwd_jax.data.pictures import from_uint8
from lwd_jax.errors import UserError
from lwd_jax.nn.conditioning import Conditioning, told
from lwd_jax.objective.matching import draw_times, matching_loss
from lwd_jax.objective.reconstruction import reconstruction_loss
from lwd_jax.parallel.mesh import batch_parts, over, platform_of
from lwd_jax.parallel.rules import batch_shardings, replicated
from lwd_jax.train.operands import operands
from lwd_jax.train.optimizer import make_optimizer, trainable_paths
from lwd_jax.train.state import State, merge, new_state, split, state_shardings
from lwd_jax.train.step import Loss, keeps_average, make_step
from lwd_jax.weights.table import flat, nested

_OUTPUT = (r"^decoder/norm_out/", r"^decoder/conv_out/")  # 3,715 parameters: the last mapping to a picture
_TABLES = (r"(^|/)[^/]*(position|pos_embed)[^/]*(/[^/]+)?$",)  # tables of sines, not parameters of the original


def never_trained(config: Config) -> tuple[str, ...]:
    """Path patterns that do not train in the stage of a config, whatever its optimizer section says."""
    if config.stage == 1:
        return _OUTPUT if config.reconstruction.freeze_output else ()
    return _TABLES


# By default XLA:CPU orders operations for parallelism alone. Ordered by memory, a step of SD3-medium's width (three
# blocks, batch 1) takes 0.96 GiB of temporaries instead of 1.42, a LoRA step of FLUX's width (seven) 1.2 instead of
# 2.2, in about the same time.
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class Stage(NamedTuple):
    """What is trained.

    Attributes:
      init: key -> random parameters.
      loss: (params, batch, keys [B]) -> (float32 scalar, metrics). A loss with weights of its own (LPIPS) is a
        jax.tree_util.Partial that holds them: they are handed to the compiled step and are no constants of it.
      batch: name -> ShapeDtypeStruct, a batch at the config's resolution.
      frozen: path patterns that never train.
      adapt: (parameters that were read, key) -> those that `init` has the shapes of; pure. With adapters it puts new
        ones beside the kernels.
      operands: parameters that train -> what the loss is differentiated with respect to: the same, or for some kernels
        what stands beside them for their copy in the precision of products (`nn.layers.OPERAND`).
    """

    init: Callable
    loss: Loss
    batch: dict[str, jax.ShapeDtypeStruct]
    frozen: tuple[str, ...]
    adapt: Callable = lambda params, key: params
    operands: Callable = lambda trainable: trainable


class Step:
    """The compiled step, `(State, batch, key) -> (State, metrics)`, with the stage's loss filled in.

    It is traced under the mesh, which models read (nn.sharding).
    """

    def __init__(self, jitted: Callable, loss: Loss, mesh: Mesh):
        self._jitted, self._mesh = jitted, mesh
        # A Partial of a Partial would hide its leaves.
        self._loss = loss if isinstance(loss, Partial) else Partial(loss)

    @functools.cached_property
    def _placed(self):
        return jax.device_put(self._loss, replicated(self._mesh))

    def __call__(self, state: State, batch: Any, key: jax.Array) -> tuple[State, dict]:
        return over(self._mesh, self._jitted)(self._placed, state, batch, key)

    def lower(self, state: State, batch: Any, key: jax.Array):
        """As of a jitted function; abstract arguments will do."""
        return over(self._mesh, self._jitted.lower)(self._loss, state, batch, key)

    def compile(self, state: State, batch: Any, key: jax.Array) -> Callable:
        """The step compiled for these arguments: (State, batch, key) -> (State, metrics)."""
        return functools.partial(self.lower(state, batch, key).compile(), self._placed)


class Program(NamedTuple):
    """One stage on one mesh.

    Attributes:
      init: (key, params=None) -> State on the mesh; with random parameters, or with those given (consumed).
      complete: (State, params) -> State on the mesh: what a checkpoint of adapters restored, over its base.
      step: (State, batch, key) -> (State, metrics), compiled once per batch shape; the state given is consumed.
      batch: ShapeDtypeStructs with shardings of a square batch; other buckets: `parallel.rules.batch_shardings`.
      state: the same of the state.
    """

    init: Callable
    complete: Callable
    step: Callable
    batch: dict[str, jax.ShapeDtypeStruct]
    state: State


# ------------------------------------------------------------------------------------------------------- stages


def autoencoder_stage(config: Config, module: nn.Module, init: Callable, perceptual: Callable | None) -> Stage:
    """Stage 1: scale-consistent fine-tuning of the autoencoder on uint8 pictures [B H W 3].

    Args:
      config: of the run.
      module: the autoencoder.
      init: key -> its random parameters.
      perceptual: (x, y) -> [B], a pytree of its weights (`load_lpips`), or None where reconstruction.lpips is 0.
    """

    def loss(perceptual, params, batch, keys):
        x = from_uint8(batch["picture"])
        per_picture, metrics = reconstruction_loss(
            lambda x: module.apply({"params": params}, x, method="encode"),
            lambda z: module.apply({"params": params}, z, method="decode"),
            x,
            keys[0],  # the scale is drawn once for the pictures that are processed together
            config.reconstruction,
            perceptual,
        )
        return per_picture.mean(), metrics

    side = config.resolution
    batch = {"picture": jax.ShapeDtypeStruct((config.data.batch_size, side, side, 3), jnp.uint8)}
    return Stage(init, Partial(loss, perceptual), batch, never_trained(config))


def latent_of(key: jax.Array, mean: jax.Array, std: jax.Array, scale: Callable) -> jax.Array:
    """A sample of the posterior of one picture, as a latent in use: scale(mean + std N(0, I)), [h w C]."""
    return scale(mean + std * jax.random.normal(key, mean.shape))


def backbone_stage(
    config: Config, module: nn.Module, init: Callable, scale: Callable, latent: tuple, tokens: int
) -> Stage:
    """Stage 2: flow matching under the wavelet mask, on cached posteriors and text states.

    Args:
      config: of the run.
      module: the backbone, of the config's dtype.
      init: key -> its random parameters.
      scale: unscaled latent -> latent in use, of the autoencoder that made the cache.
      latent: (h, w, C) of a square picture.
      tokens: text tokens per caption.
    """
    matching, model = config.matching, module.config

    def draw(key, mean, std):
        sample, noise, time = jax.random.split(key, 3)
        count = mean.shape[0] * mean.shape[1] // model.patch_size**2
        return (
            latent_of(sample, mean, std, scale),
            jax.random.normal(noise, mean.shape),
            draw_times(time, 1, matching, count)[0],
        )

    def loss(params, batch, keys):
        with jax.named_scope("draw"):
            z0, noise, t = jax.vmap(draw)(keys, batch["mean"], batch["std"])
        cond = told(Conditioning(batch["tokens"], batch["token_mask"], batch["pooled"]), model, matching.guidance)

        def predict(z_t, t, cond):
            with dropout(config.adapter.dropout, keys):
                return module.apply({"params": params}, z_t, t, cond, rngs=streams(config.adapter.dropout))

        per_picture, metrics = matching_loss(predict, z0, cond, t, noise, matching)
        return per_picture.mean(), metrics

    size = config.data.batch_size
    shapes = {
        "mean": (size, *latent),
        "std": (size, *latent),
        "tokens": (size, tokens, model.joint_attention_dim),
        "token_mask": (size, tokens),
        "pooled": (size, model.pooled_projection_dim),
    }
    dtypes = {"tokens": jnp.dtype(config.dtype)}
    batch = {name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32)) for name, shape in shapes.items()}
    rounded = functools.partial(operands, dtype=jnp.dtype(config.dtype))
    return adapted(Stage(init, loss, batch, never_trained(config), operands=rounded), config)


def adapted(stage: Stage, config: Config) -> Stage:
    """The stage with the adapters of the config beside the kernels; as it is where there are none."""
    if config.adapter.kind == "none":
        return stage

    def adapt(params, key):
        return attach(params, key, config.adapter)

    return stage._replace(init=lambda key: adapt(stage.init(key), key), adapt=adapt)


# ------------------------------------------------------------------------------------------------------ program


def check_sizes(config: Config, mesh: Mesh, batch: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Checks that the batch and its pictures divide over the mesh.

    Raises:
      UserError: they do not.
    """
    accumulate, parts = config.optimizer.accumulate, batch_parts(mesh)
    if config.data.batch_size // accumulate % parts:
        raise UserError(
            f"data.batch_size {config.data.batch_size} in {accumulate} accumulation steps does not divide over "
            f"data x fsdp = {parts} devices; make it a multiple of {accumulate * parts}."
        )
    for name, leaf in batch.items():
        if len(leaf.shape) == 4 and leaf.shape[1] % mesh.shape["context"]:
            raise UserError(
                f"The height of '{name}' is {leaf.shape[1]} at resolution {config.resolution}, which does not divide "
                f"over mesh.context = {mesh.shape['context']}."
            )


def _with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def trained_paths(stage: Stage, config: Config, abstract_params: Any) -> frozenset[str]:
    """The paths of the parameters that this run trains."""
    return trainable_paths(trainable(flat(abstract_params)), config.optimizer, stage.frozen)


def _start(config: Config, trained: frozenset[str]) -> Callable:
    """params -> the State before the first step."""
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    return lambda params: new_state(params, trained, optimizer, keeps_average(config))


def abstract_state(config: Config, stage: Stage) -> State:
    """ShapeDtypeStructs of the state, without layouts: they depend on the mesh, the shapes do not.

    Raises:
      UserError: unknown or contradictory optimizer settings, patterns that name nothing.
    """
    abstract_params = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.eval_shape(_start(config, trained_paths(stage, config, abstract_params)), abstract_params)


def build_program(config: Config, mesh: Mesh, stage: Stage) -> Program:
    """The compiled functions and the layouts of one stage on a mesh; nothing is allocated or compiled yet.

    Raises:
      UserError: sizes that do not divide, unknown or contradictory optimizer settings, patterns that name nothing.
    """
    check_sizes(config, mesh, stage.batch)
    abstract_params = jax.eval_shape(stage.init, jax.random.key(0))
    trained = trained_paths(stage, config, abstract_params)
    start = _start(config, trained)
    abstract = jax.eval_shape(start, abstract_params)
    shardings = state_shardings(abstract, mesh)
    from_key = jax.jit(lambda key: start(stage.init(key)), out_shardings=shardings)
    # Fixed factors of earlier adapters may be joined by others: their memory is not the new ones'.
    from_params = jax.jit(
        lambda base, factors, key: start(stage.adapt(merge(base, factors), key)),
        out_shardings=shardings,
        donate_argnums=0,
    )
    layouts = flat(shardings.params)
    factors = frozenset(filter(is_factor, layouts))

    def place(params):
        return jax.device_put(params, nested({path: layouts[path] for path in flat(params)}))

    def init(key, params=None):
        return from_key(key) if params is None else from_params(*reversed(split(place(params), factors)), key)

    def complete(state, params):
        return state._replace(params=merge(place(params), state.params))

    step = jax.jit(
        make_step(trained, config, stage.operands),
        in_shardings=(replicated(mesh), shardings, None, replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=1,
        compiler_options=_CPU_OPTIONS if platform_of(mesh) == "cpu" else None,
    )
    return Program(
        init=init,
        complete=complete,
        step=Step(step, stage.loss, mesh),
        batch=_with_shardings(stage.batch, batch_shardings(stage.batch, mesh)),
        state=_with_shardings(abstract, shardings),
    )
