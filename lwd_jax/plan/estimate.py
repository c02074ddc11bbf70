"""What a train step takes on a mesh, by shapes alone: good enough to say which meshes are worth compiling for.

Shapes and operations of one picture are evaluated once per remat policy; every mesh and batch is arithmetic on them.
What is sent and moved follows formulas of how the layouts of parallel/rules.py are computed with; they know nothing of
the compiler's choices.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh
from jax.tree_util import Partial

from lwd_jax.config import Config
from lwd_jax.nn import attention
from lwd_jax.nn.platform import for_platform
from lwd_jax.parallel.mesh import AXES, batch_parts
from lwd_jax.parallel.rules import WEIGHT_AXES, batch_shardings
from lwd_jax.plan.compile import resident_bytes
from lwd_jax.plan.count import Operations, operations_of
from lwd_jax.plan.flops import TRAINING, backbone_forward
from lwd_jax.plan.programs import abstract_stage, placed, spared
from lwd_jax.plan.result import Result
from lwd_jax.plan.topology import Topology
from lwd_jax.plan.traffic import BETWEEN_SLICES, SENT, Traffic
from lwd_jax.train.models import open_trained
from lwd_jax.train.program import Stage, abstract_state, trained_paths
from lwd_jax.train.state import State, merge, split, state_shardings

_FLOAT32 = 4  # bytes


class Work(NamedTuple):
    """One picture's gradient under one remat policy.

    Attributes:
      operations: of forward and backward, recomputation included.
      saved: bytes that wait for the backward pass.
    """

    operations: Operations
    saved: float


class Tokens(NamedTuple):
    """What the backbone of stage 2 exchanges between the chips of one picture.

    Attributes:
      count, width: of the residual stream, pictures and text together.
      layers: blocks with an attention each.
    """

    count: int
    width: int
    layers: int


class Shapes(NamedTuple):
    """What a run is on every mesh.

    Attributes:
      state: ShapeDtypeStructs.
      trained: bytes of the gradients of all that trains.
      summed: bytes of their sum over accumulation steps.
      batch: name -> ShapeDtypeStruct of one picture.
      work: remat policy -> of one picture.
      model: FLOPs of one picture by formula, nothing recomputed.
      heads: of an attention, which `tensor` divides.
      rows: of what is least high (patches; in stage 1, the smallest latent that is decoded), which `context` divides.
      blocks: of which one at a time is recomputed; stage 1: of the decoder, the larger half.
      tokens: of a backbone; None in stage 1.
    """

    state: State
    trained: float
    summed: float
    batch: dict[str, Any]
    work: dict[str, Work]
    model: float
    heads: int
    rows: int
    blocks: int
    tokens: Tokens | None


# ------------------------------------------------------------------------------------------------------ one picture


def _work(config: Config, remat: str) -> Work:
    """Traced once, forward and backward."""
    config = dataclasses.replace(config, remat=remat)
    stage = abstract_stage(config)
    params = abstract_state(config, stage).params
    trainable, frozen = split(params, trained_paths(stage, config, params))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.data.batch_size))
    loss = stage.loss if isinstance(stage.loss, Partial) else Partial(stage.loss)

    def backward(trainable, loss, frozen, batch, keys):
        value, pull = jax.vjp(lambda moved: loss(merge(frozen, moved), batch, keys)[0], trainable)
        return pull, pull(jnp.ones_like(value))

    jaxpr = jax.make_jaxpr(backward)(trainable, loss, frozen, stage.batch, keys).jaxpr
    gradients = len(jax.tree.leaves(trainable))
    saved = jaxpr.outvars[:-gradients]
    wanted = [False] * len(saved) + [True] * gradients
    # Parameters and the batch wait too, but lie there anyway; copies of parameters are no picture's.
    given, copies = set(jaxpr.invars), {leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1}
    waits = [x.aval for x in saved if not isinstance(x, Literal) and x not in given and x.aval.shape not in copies]
    return Work(operations_of(jaxpr, wanted), float(sum(math.prod(x.shape) * x.dtype.itemsize for x in waits)))


class _Sizes(NamedTuple):
    """What differs between the stages: the last fields of Shapes."""

    model: float
    heads: int
    rows: int
    blocks: int
    tokens: Tokens | None


def _sizes(config: Config, stage: Stage, plain: Operations) -> _Sizes:
    """Of one picture; `plain`: of its gradient, nothing recomputed, which is an autoencoder's formula."""
    sizes = open_trained(config).module.config
    if config.stage == 1:
        scales = config.reconstruction.scales if config.reconstruction.alpha else ()
        height = stage.batch["picture"].shape[1] // sizes.factor
        blocks = len(sizes.block_out_channels) * (sizes.layers_per_block + 1)
        return _Sizes(plain.total, 1, height // max(scales, default=1), blocks, None)
    height, width = stage.batch["mean"].shape[1:3]
    rows, columns, text = height // sizes.patch_size, width // sizes.patch_size, stage.batch["tokens"].shape[1]
    model = float(TRAINING * backbone_forward(sizes, height, width, text)) - spared(config)
    tokens = Tokens(rows * columns + text, sizes.width, sizes.blocks)
    return _Sizes(model, sizes.num_attention_heads, rows, sizes.blocks, tokens)


def evaluate_shapes(config: Config, platform: str, remats: tuple[str, ...]) -> Shapes:
    """Shapes and operations of a run, for meshes and batches of every size.

    Args:
      platform: whose attention kernel is counted.
      remats: policies; "none" must be one of them.

    Raises:
      UserError: models that do not fit each other, settings that contradict each other.
    """
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    stage = abstract_stage(single)
    state = abstract_state(single, stage)
    with for_platform(platform):
        work = {remat: _work(single, remat) for remat in remats}
    trainable = split(state.params, trained_paths(stage, single, state.params))[0]
    gradients = jax.tree.leaves(jax.eval_shape(stage.operands, trainable))
    trained = float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in gradients))
    summed = float(sum(math.prod(leaf.shape) for leaf in gradients) * _FLOAT32)
    return Shapes(state, trained, summed, stage.batch, work, *_sizes(single, stage, work["none"].operations))


# ------------------------------------------------------------------------------------------------- one mesh and batch


class Estimate(NamedTuple):
    """A train step, not compiled.

    Attributes:
      result: its resident bytes and operations by shape evaluation, traffic and moved memory by formula; its peak is
        not known.
      temporaries: bytes per chip beside the resident ones: gradients, what waits for the backward pass, and the inside
        of the block that is recomputed. The compiler's buffers come on top.
    """

    result: Result
    temporaries: float


def state_bytes(shapes: Shapes, mesh: AbstractMesh) -> float:
    """Bytes per chip of the state.

    Raises:
      UserError: a parameter does not divide over the mesh.
    """
    return resident_bytes(placed(shapes.state, state_shardings(shapes.state, mesh)))


def batch_of(shapes: Shapes, pictures: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of so many pictures, without layouts."""
    return {name: jax.ShapeDtypeStruct((pictures, *x.shape[1:]), x.dtype) for name, x in shapes.batch.items()}


def estimate(config: Config, topology: Topology, shapes: Shapes, mesh: AbstractMesh, state: float) -> Estimate:
    """The train step of a config on a mesh.

    Args:
      shapes: `evaluate_shapes` of the run; the config differs from it in mesh, remat and batch at most.
      state: `state_bytes` on that mesh.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    pictures, work = config.data.batch_size, shapes.work[config.remat]
    batch = batch_of(shapes, pictures)
    resident = state + resident_bytes(placed(batch, batch_shardings(batch, mesh)))
    saved = work.saved + max(shapes.work["none"].saved - work.saved, 0.0) / shapes.blocks
    # A picture's activations lie over context; the residual stream, most of what remat policies save, is whole along
    # tensor. Only those of one accumulation step wait.
    of_chip = pictures / (batch_parts(mesh) * mesh.shape["context"])
    gradients = shapes.trained + (shapes.summed if config.optimizer.accumulate > 1 else 0.0)
    temporaries = _of_shard(gradients, config, mesh) + saved * of_chip / config.optimizer.accumulate
    result = Result(
        program="train",
        pictures=pictures,
        mesh=dict(mesh.shape),
        resident=resident,
        model=shapes.model * pictures,
        counted=work.operations.times(pictures),
        moved=2 * state + _weights_moved(config, shapes, mesh) + _activations_moved(config, shapes) * of_chip,
        traffic=tuple(_traffic(config, shapes, mesh, topology.slices)),
        missing=topology.missing,
    )
    return Estimate(result, temporaries)


def _weight_axes(config: Config, mesh: AbstractMesh) -> tuple[tuple[str, ...], int]:
    """The axes of more than one device that weights are split over besides `tensor`, and their devices."""
    axes = tuple(axis for axis in (WEIGHT_AXES if config.stage == 2 else ("fsdp",)) if mesh.shape[axis] > 1)
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def _of_shard(size: float, config: Config, mesh: AbstractMesh) -> float:
    return size / (_weight_axes(config, mesh)[1] * mesh.shape["tensor"])


def _half(config: Config) -> int:
    """Bytes of a number in matrix products."""
    return jnp.dtype(config.dtype).itemsize


def _weights(config: Config, shapes: Shapes, mesh: AbstractMesh) -> float:
    """Bytes of all weights as they are multiplied with, gathered."""
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.state.params))
    return count * _half(config) / mesh.shape["tensor"]


def _weights_moved(config: Config, shapes: Shapes, mesh: AbstractMesh) -> float:
    """Bytes per chip: gathered (written) and read, forward and backward, in every accumulation step."""
    return 2 * 2 * config.optimizer.accumulate * _weights(config, shapes, mesh)


def _activations_moved(config: Config, shapes: Shapes) -> float:
    """Bytes of one picture: all that is made is written and read again; what is not saved is made twice."""
    everything = shapes.work["none"].saved
    again = max(1 - shapes.work[config.remat].saved / everything, 0.0) if everything else 0.0
    return 2 * everything * (1 + again)


def _traffic(config: Config, shapes: Shapes, mesh: AbstractMesh, slices: int):
    """Rows of what each chip sends, where it sends anything."""
    accumulate = config.optimizer.accumulate
    data, _, context, tensor = (mesh.shape[axis] for axis in AXES)
    gradients = _of_shard(shapes.trained, config, mesh)
    split, parts = _weight_axes(config, mesh)
    rows = [  # axis, collective, bytes of its operands
        ("+".join(split), "all-gather", 2 * accumulate * _weights(config, shapes, mesh) / parts),
        ("+".join(split), "reduce-scatter", accumulate * gradients * parts),
        ("data", "all-reduce", gradients),
    ]
    if shapes.tokens is not None:
        count, width, layers = shapes.tokens
        share = count / context * width * _half(config) * layers * config.data.batch_size / batch_parts(mesh)
        passes = 3 if config.remat == "full" else 2
        # Two sums a block over the partial results of tensor, forward and backward.
        rows.append(("tensor", "all-reduce", 2 * passes * share))
        if attention.exchange(shapes.heads // tensor, context) == "ulysses":  # q k v there, the result back
            rows.append(("context", "all-to-all", 4 * passes * share / tensor))
        else:  # k and v there, their gradients back
            rows.append(("context", "all-gather", 2 * passes * share / tensor))
    if slices > 1:
        yield Traffic("all-reduce", BETWEEN_SLICES, 1, SENT["all-reduce"](slices) * gradients)
    sizes = {"data": data // slices, "context": context, "tensor": tensor, "+".join(split): parts}
    for axis, kind, size in rows:
        if sizes[axis] > 1:
            yield Traffic(kind, axis, 1, SENT[kind](sizes[axis]) * size)
