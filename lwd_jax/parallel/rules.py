"""Parameter and batch layouts: tables of path patterns; the first match wins, no match raises.

A layout names, for every axis counted from the last, the mesh axes it is split over. Leading axes that a rule does not
name (the layers of scanned blocks) are never split: the scan walks along them.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwd_jax.errors import UserError
from lwd_jax.nn.sharding import BATCH_AXES
from lwd_jax.parallel.mesh import check_batch

SMALL = 1 << 20  # bytes; a parameter below this may be whole on every device when its sizes do not divide


class Rule(NamedTuple):
    """Layouts of the last axes, the first that divides is taken; () is whole on every device."""

    pattern: str  # searched in "a/b/c"
    layouts: tuple[tuple, ...]


# The weights of a transformer are split over `context` too where it divides them: its devices hold other positions of
# the same pictures, and have no more use for whole weights than those that hold other pictures.
WEIGHT_AXES = ("fsdp", "context")

# Dense kernels are [.., in, out]: `tensor` splits the axis that is made of heads or hidden units, so that a pair (q k v
# -> out, up -> down) needs one sum over `tensor`, and WEIGHT_AXES split the other. Along [in], as the others, out and
# down would make a chip send nearly twice as much (SD3-medium at 1024 px on v5e:4x4: 19.7 GB a step instead of 10.9).
# Of the factors of an adapter, [.., in, r] and [.., r, out], the long axis is split. Convolutions are [kh, kw, in,
# out]; over `context` lie the rows that they read.
_COLUMN = ((WEIGHT_AXES, "tensor"), (WEIGHT_AXES, None), (None, WEIGHT_AXES))
_ROW = (("tensor", WEIGHT_AXES), (None, WEIGHT_AXES), (WEIGHT_AXES, None))
_PLAIN = ((WEIGHT_AXES, None), (None, WEIGHT_AXES))
_CONV = ((None, None, "fsdp", "tensor"), (None, None, "fsdp", None), (None, None, None, "fsdp"))
RULES = (
    Rule(r"(^|/)(bias|scale|lora_scale)$", ((),)),
    Rule(r"(^|/)[^/]*(position|pos_embed)[^/]*(/[^/]+)?$", _PLAIN),
    Rule(r"(^|/)[^/]*conv[^/]*/kernel$", _CONV),
    Rule(r"(^|/)(\w+_)?(q|k|v|up|gate|modulation)/kernel$", _COLUMN),
    Rule(r"(^|/)(\w+_)?(out|down)/kernel$", _ROW),
    Rule(r"(^|/)kernel$", _PLAIN),
    Rule(r"(^|/)(lora|fixed)_a$", ((WEIGHT_AXES, None), ())),
    Rule(r"(^|/)(lora|fixed)_b$", ((None, WEIGHT_AXES), ())),
)


def path_string(path) -> str:
    """`a/b/c` of a jax key path through nested dicts and named tuples."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _divides(shape: tuple[int, ...], layout: tuple, mesh: Mesh) -> bool:
    def parts(axes):
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))

    sizes = shape[len(shape) - len(layout) :]
    return all(size % parts(axes) == 0 for size, axes in zip(sizes, layout))


def _choices(rule: Rule, mesh: Mesh) -> Iterator[tuple]:
    """The layouts of a rule on a mesh, best first."""
    for layout in rule.layouts:
        if mesh.shape["context"] > 1:
            yield layout
        yield tuple("fsdp" if axes == WEIGHT_AXES else axes for axes in layout)


def spec_of(path: str, shape: tuple[int, ...], itemsize: int, mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of one parameter.

    Raises:
      UserError: no rule names the path, or a parameter of SMALL bytes or more does not divide by the mesh.
    """
    for rule in RULES:
        if not re.search(rule.pattern, path):
            continue
        for layout in _choices(rule, mesh):
            if len(layout) <= len(shape) and _divides(shape, layout, mesh):
                layers = (None,) * (len(shape) - len(layout)) if layout else ()
                return PartitionSpec(*layers, *layout)
        if math.prod(shape) * itemsize < SMALL:
            return PartitionSpec()
        raise UserError(
            f"Parameter '{path}' {tuple(shape)} does not divide over the mesh axis fsdp ({mesh.shape['fsdp']}); choose "
            "a mesh whose sizes divide the model's."
        )
    raise UserError(f"No sharding rule names the parameter '{path}'; add a row to lwd_jax/parallel/rules.py.")


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a parameter tree (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_string(path), leaf.shape, leaf.dtype.itemsize, mesh)),
        abstract_params,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Layouts of a batch: the first axis over (data, fsdp); the height of pictures and latents over context.

    A bucket whose height does not divide by context is split along its width; if that does not divide either it is
    whole along both.

    Raises:
      UserError: the batch does not divide over data x fsdp.
    """
    shardings = {}
    for name, leaf in batch.items():
        check_batch(leaf.shape[0], mesh)
        spatial = ()
        if len(leaf.shape) == 4:
            context = mesh.shape["context"]
            height, width = leaf.shape[1:3]
            spatial = ("context",) if height % context == 0 else (None, "context") if width % context == 0 else ()
        shardings[name] = NamedSharding(mesh, PartitionSpec(BATCH_AXES, *spatial))
    return shardings


def place_batch(batch: Any, mesh: Mesh, rows: np.ndarray | None = None) -> Any:
    """A tree of arrays [N ..], the same in every process, on the mesh, laid out as `batch_shardings` says.

    Args:
      batch: the arrays.
      mesh: where to.
      rows: [B], which rows of the arrays make the batch, copies too; None = all. Each process reads its own alone.

    Raises:
      UserError: the batch does not divide over data x fsdp.
    """

    def place(leaf):
        host = np.asarray(leaf)
        chosen = np.arange(len(host)) if rows is None else rows
        shape = jax.ShapeDtypeStruct((len(chosen), *host.shape[1:]), host.dtype)
        sharding = batch_shardings({"": shape}, mesh)[""]
        return jax.make_array_from_callback(shape.shape, sharding, lambda at: host[chosen[at[0]]][:, *at[1:]])

    return jax.tree.map(place, batch)
