"""Two-way tables between foreign checkpoints and our parameters, with exact cover.

One row says which foreign tensor (or run of tensors) is which parameter. Reading and writing are the same rows. Every
tensor and every parameter must be claimed by exactly one row and have the shape the row gives it; anything else is a
UserError that names the tensors.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from lwd_jax.errors import UserError
from lwd_jax.weights.layout import LINEAR, SAME, Layout, foreign_shape

FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))
_LISTED = 4  # how many names an error lists before it only counts


class Row(NamedTuple):
    """One parameter of ours and where it comes from.

    Attributes:
      foreign: the name of the foreign tensor. With `count` > 0 it holds "{i}", which runs over start .. start + count
        - 1, and these tensors are stacked on a new leading axis of the one parameter.
      ours: path of our parameter, components separated by "/".
      layout: of one foreign tensor (without the stacked axis).
      older: another name under which older checkpoints store the same tensor; read, never written.
    """

    foreign: str
    ours: str
    layout: Layout = SAME
    start: int = 0
    count: int = 0
    older: str = ""


def linear_rows(foreign: str, ours: str, start: int = 0, count: int = 0) -> list[Row]:
    """The rows of a linear layer with a bias; `foreign` and `ours` are those of the layer."""
    return [
        Row(f"{foreign}.weight", f"{ours}/kernel", LINEAR, start, count),
        Row(f"{foreign}.bias", f"{ours}/bias", start=start, count=count),
    ]


def _run(row: Row, pattern: str) -> list[str]:
    if not row.count:
        return [pattern]
    return [pattern.replace("{i}", str(i)) for i in range(row.start, row.start + row.count)]


def foreign_names(row: Row) -> list[str]:
    """The foreign tensors of a row."""
    return _run(row, row.foreign)


def _names(row: Row, present: Mapping[str, Any]) -> list[str]:
    """The foreign names of a row, in its older spelling where only that one is present."""
    names = foreign_names(row)
    if not row.older:
        return names
    return [old if old in present and name not in present else name for name, old in zip(names, _run(row, row.older))]


def flat(params) -> dict[str, Any]:
    """Nested dict -> {"a/b/kernel": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def quoted(names: Sequence[str]) -> str:
    """The first of the names, in quotes, and how many more there are."""
    return _listed([f"'{name}'" for name in names])


def counted(count: int) -> str:
    """So many tensors, in words."""
    return f"{count} tensor{'' if count == 1 else 's'}"


def _check_ours(rows: Sequence[Row], params: Mapping[str, Any]) -> None:
    """Every parameter is claimed by exactly one row, and every row names a parameter."""
    claims = Counter(row.ours for row in rows)
    for wrong, what in (
        ([path for path, times in claims.items() if times > 1], "claimed by more than one row of the weights table"),
        ([path for path in params if path not in claims], "in no row of the weights table"),
        ([path for path in claims if path not in params], "in the weights table, but not in the model"),
    ):
        if wrong:
            raise UserError(f"Parameters are {what}: {quoted(wrong)}.")


def _expected(row: Row, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape each foreign tensor of a row must have for a parameter of this shape; None when the row cannot fit."""
    if row.count and shape[0] != row.count:
        return None
    return foreign_shape(row.layout, shape[1:] if row.count else shape)


def cover(rows: Sequence[Row], manifest: Mapping[str, tuple[int, ...]], abstract_params) -> None:
    """Checks that the rows, the foreign tensors and our parameters cover each other exactly.

    Args:
      rows: the weights table.
      manifest: foreign name -> shape.
      abstract_params: our parameters, as ShapeDtypeStructs (or arrays).

    Raises:
      UserError: tensors missing, claimed by no row or by two, or misshaped; parameters without a row, or with two.
    """
    params = flat(abstract_params)
    _check_ours(rows, params)
    claims = Counter(name for row in rows for name in _names(row, manifest))
    twice = [name for name, times in claims.items() if times > 1]
    if twice:
        raise UserError(f"{counted(len(twice))} claimed by more than one row of the weights table: {quoted(twice)}.")
    missing = [name for name in claims if name not in manifest]
    if missing:
        raise UserError(f"The checkpoint lacks {counted(len(missing))} of this model: {quoted(missing)}.")
    unclaimed = [name for name in manifest if name not in claims]
    if unclaimed:
        raise UserError(f"The checkpoint has {counted(len(unclaimed))} unknown to this model: {quoted(unclaimed)}.")
    misshaped = []
    for row in rows:
        expected = _expected(row, tuple(params[row.ours].shape))
        for name in _names(row, manifest):
            if tuple(manifest[name]) != expected:
                wanted = expected if expected is not None else f"one of a stack of {row.count}"
                misshaped.append(f"'{name}' is {tuple(manifest[name])}, not {wanted}")
    if misshaped:
        count = counted(len(misshaped))
        raise UserError(f"The checkpoint has {count} of another shape than this model: {_listed(misshaped)}.")


def check_floats(tensors: Mapping[str, Any]) -> None:
    """Raises UserError where a tensor is not of a floating-point type that weights may have."""
    wrong = [f"'{name}' ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if wrong:
        raise UserError(f"Weights must be float32, float16 or bfloat16, but the checkpoint has {_listed(wrong)}.")


def _gather(row: Row, tensors: Mapping[str, Any], shape: tuple[int, ...], dtype) -> np.ndarray:
    """One parameter in host memory, always a fresh copy. A stacked one is filled tensor by tensor."""
    host = np.empty(shape, dtype)
    for i, name in enumerate(_names(row, tensors)):
        host[i if row.count else ...] = row.layout.to_ours(np.asarray(tensors[name]))
    return host


def _place(host: np.ndarray, sharding) -> jax.Array:
    """On the devices; waits, so that at most one parameter is in host memory at a time."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(host))
    return jax.block_until_ready(jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]))


class Unread(NamedTuple):
    """A parameter of a foreign checkpoint. `np.asarray(unread)` reads it."""

    row: Row
    tensors: Mapping[str, Any]
    shape: tuple[int, ...]

    def __array__(self, dtype=None, copy=None):
        return _gather(self.row, self.tensors, self.shape, np.float32 if dtype is None else dtype)


def unread_params(rows: Sequence[Row], tensors: Mapping[str, Any], abstract_params):
    """Our parameters as a nested dict of `Unread`; arguments and errors as of `read`."""
    cover(rows, {name: tensor.shape for name, tensor in tensors.items()}, abstract_params)
    check_floats(tensors)
    params = flat(abstract_params)
    return nested({row.ours: Unread(row, tensors, tuple(params[row.ours].shape)) for row in rows})


def read(rows: Sequence[Row], tensors: Mapping[str, Any], abstract_params, *, shardings=None, dtype=None):
    """Our parameters, read from foreign tensors one parameter at a time.

    Args:
      rows: the weights table.
      tensors: foreign name -> array, or anything with .shape, .dtype and conversion by np.asarray (folder.Tensors).
      abstract_params: nested dict of ShapeDtypeStructs.
      shardings: the same tree of jax.sharding.Sharding; every device gets its part only. None = the default device.
      dtype: of the result; None = the dtypes of abstract_params.

    Returns:
      Nested dict of jax arrays.

    Raises:
      UserError: see `cover`; also for tensors that are not floating point.
    """
    cover(rows, {name: tensor.shape for name, tensor in tensors.items()}, abstract_params)
    check_floats(tensors)
    params = flat(abstract_params)
    places = flat(shardings) if shardings is not None else dict.fromkeys(params)
    leaves = {}
    for row in rows:
        param = params[row.ours]
        host = _gather(row, tensors, param.shape, param.dtype if dtype is None else dtype)
        leaves[row.ours] = _place(host, places[row.ours])
    return nested(leaves)


def write(rows: Sequence[Row], params) -> Iterator[tuple[str, np.ndarray]]:
    """The foreign tensors of our parameters, one at a time: (name, array) in the order of the rows.

    Raises:
      UserError: parameters without a row, with two, or of another shape than the row's stack.
    """
    leaves = flat(params)
    _check_ours(rows, leaves)
    for row in rows:
        leaf = leaves[row.ours]
        if _expected(row, tuple(leaf.shape)) is None:
            raise UserError(f"Parameter '{row.ours}' of shape {leaf.shape} should stack {row.count} tensors.")
        for i, name in enumerate(foreign_names(row)):
            tensor = np.asarray(leaf[i] if row.count else leaf)
            yield name, np.asarray(row.layout.to_foreign(tensor), order="C")
