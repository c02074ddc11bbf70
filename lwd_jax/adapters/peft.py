"""Adapters as safetensors files: the layout of diffusers and PEFT both ways, kohya's layout written.

A file holds, for every layer "M" that is adapted, PEFT's "transformer.M.lora_A.weight" [r, in] and "..lora_B.weight"
[out, r], or kohya's "lora_transformer_M.lora_down.weight", "..lora_up.weight" and "..alpha", the dots of M written as
underscores. Names and axes of M are those of the model's weights table: this file knows no model. Scales are written
into the second factor, so that alpha = r and every reader agrees about them.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lwd_jax.adapters.factors import joined, pairs_beside
from lwd_jax.errors import UserError
from lwd_jax.files import on_disk
from lwd_jax.nn.layers import SCALE, TRAINED
from lwd_jax.weights.folder import Stored, header
from lwd_jax.weights.layout import LINEAR
from lwd_jax.weights.table import Row, check_floats, counted, flat, foreign_names, nested, quoted

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
KOHYA_FILE = "kohya_lora_weights.safetensors"
_PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"  # where newer diffusers keeps PEFT's settings, as JSON


def _modules(row: Row) -> list[str]:
    """The foreign layers of a kernel's row."""
    return [name.removesuffix(".weight") for name in foreign_names(row)]


def _kernel_rows(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """(path of the layer, row) of every kernel."""
    for row in rows:
        if row.ours.endswith("/kernel"):
            yield row.ours.removesuffix("/kernel"), row


# ---------------------------------------------------------------------------------------------------------- writing


def products(rows: Sequence[Row], params: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Foreign layer -> (A [r, in], B [out, r]) in float32, whose product B A is all that adapters add to its weight. An
    adapter over an earlier one comes as one of the summed rank, as URAE writes its own: 16 + 16 + 16.

    Args:
      rows: the weights table.
      params: with factors beside kernels.

    Raises:
      UserError: there is no adapter, or it lies beside a kernel whose layout no low-rank pair has.
    """
    leaves, found = flat(params), {}
    for path, row in _kernel_rows(rows):
        pairs = pairs_beside(leaves, path)
        if not pairs:
            continue
        if row.layout is not LINEAR:
            raise UserError(f"The adapter of '{path}' cannot be written to a file of adapters: {row.layout.name}.")
        a, b = (np.asarray(factor, np.float32) for factor in joined(pairs))
        layers = zip(a, b) if row.count else [(a, b)]
        for module, (first, second) in zip(_modules(row), layers):
            found[module] = (np.ascontiguousarray(first.T), np.ascontiguousarray(second.T))
    if not found:
        raise UserError("These parameters have no adapters to write.")
    return found


def as_peft(module: str, down: np.ndarray, up: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of one layer as diffusers and PEFT name them."""
    return {f"{_PREFIX}{module}.lora_A.weight": down, f"{_PREFIX}{module}.lora_B.weight": up}


def as_kohya(module: str, down: np.ndarray, up: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of one layer as kohya's scripts and ComfyUI name them."""
    name = f"lora_{_PREFIX}{module}".replace(".", "_")
    alpha = np.asarray(len(down), down.dtype)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}


def write_file(path: str | os.PathLike, rows: Sequence[Row], params: Any, *, layout=as_peft, dtype=np.float32) -> None:
    """Writes the adapters of a parameter tree.

    Args:
      path: of the file.
      rows: the weights table.
      params: with factors beside kernels.
      layout: as_peft or as_kohya.
      dtype: of the tensors.
    """
    tensors = {}
    for module, (down, up) in products(rows, params).items():
        tensors |= layout(module, down.astype(dtype), up.astype(dtype))
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------------- reading


def _settings(path: Any) -> dict:
    """PEFT's settings in a file, or {}."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    settings = json.loads(metadata.get(_METADATA, "{}"))
    settings = {name.removeprefix(_PREFIX): value for name, value in settings.items()}
    for name in ("alpha_pattern", "rank_pattern"):
        if settings.get(name):
            raise UserError(f"{path} sets {name}, which is not supported: write its scales into lora_B.")
    if settings.get("use_dora"):
        raise UserError(f"{path} is a DoRA, which is not supported.")
    return settings


def _scale(settings: Mapping[str, Any]) -> float:
    """What PEFT multiplies the products by; 1 where a file does not say."""
    if "lora_alpha" not in settings:
        return 1.0
    return settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])


def _by_module(path: Any, tensors: Mapping[str, Stored], known: set[str]) -> dict[str, tuple[Stored, Stored]]:
    """Foreign layer -> (lora_A, lora_B).

    Raises:
      UserError: a tensor that belongs to no layer of the model, or a layer with one of the two.
    """
    names = {f"{_PREFIX}{module}.lora_{kind}.weight": (module, kind) for module in known for kind in "AB"}
    if unknown := sorted(tensors.keys() - names.keys()):
        raise UserError(f"{path} has {counted(len(unknown))} unknown to this model: {quoted(unknown)}.")
    check_floats(tensors)
    modules = sorted({names[name][0] for name in tensors})
    wanted = [name for module in modules for name in (f"{_PREFIX}{module}.lora_{kind}.weight" for kind in "AB")]
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(f"{path} lacks {counted(len(missing))} of its adapters: {quoted(missing)}.")
    return {module: tuple(tensors[f"{_PREFIX}{module}.lora_{kind}.weight"] for kind in "AB") for module in modules}


def _stack(row: Row, shape: tuple[int, ...], pairs: Mapping[str, tuple], path: Any) -> tuple[np.ndarray, np.ndarray]:
    """(a [.., in, r], b [.., r, out]) of one kernel of this shape, r the largest rank in the file. Layers of a stack
    that the file leaves out, or has in a smaller rank, are filled up with zeros."""
    rank = max(down.shape[0] for down, _ in pairs.values())
    a = np.zeros((*shape[:-1], rank), np.float32)
    b = np.zeros((*shape[:-2], rank, shape[-1]), np.float32)
    for i, module in enumerate(_modules(row)):
        if module not in pairs:
            continue
        down, up = pairs[module]
        own = down.shape[0]
        if down.shape != (own, shape[-2]) or up.shape != (shape[-1], own):
            raise UserError(
                f"{path} has '{module}' as {up.shape} x {down.shape}, not as ({shape[-1]}, r) x (r, {shape[-2]})."
            )
        place = i if row.count else ...
        a[place][..., :own], b[place][..., :own, :] = np.asarray(down).T, np.asarray(up).T
    return a, b


def read_file(path: str | os.PathLike, rows: Sequence[Row], abstract_params: Any) -> dict[str, Any]:
    """The factors of a file of adapters in diffusers' layout: a tree of `lora_a`, `lora_b` and `lora_scale` alone, of
    one rank and one scale.

    Args:
      path: of the file.
      rows: the weights table of the model.
      abstract_params: its parameters' shapes.

    Raises:
      UserError: not a safetensors file, tensors unknown to this model or of another shape, settings not supported.
    """
    path = on_disk(path, "A file of adapters")
    tensors, shapes = header(path), flat(abstract_params)
    settings = _settings(path)
    layers = [(layer, row) for layer, row in _kernel_rows(rows) if row.layout is LINEAR]
    pairs = _by_module(path, tensors, {module for _, row in layers for module in _modules(row)})
    found = {}
    for layer, row in layers:
        if pairs.keys() & set(_modules(row)):
            shape = tuple(shapes[row.ours].shape)
            a, b = _stack(row, shape, pairs, path)
            scale = np.full(shape[:-2], _scale(settings), np.float32)
            found |= {f"{layer}/{name}": leaf for name, leaf in zip((*TRAINED, SCALE), (a, b, scale))}
    return nested(found)
