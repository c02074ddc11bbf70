"""Results of compiled programs, kept in the user's cache: a slice takes minutes to compile for.

A result is found under everything that it depends on: the run's config, the shapes and layouts of the program's
arguments, the slice, the versions of jax and of the compiler, the flags that the environment gives it, and the source
of this package.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from functools import cache
from typing import Any

import jax
from etils.epath import Path

import lwd_jax
from lwd_jax.config import Config, to_json
from lwd_jax.files import cache_folder, files_in, write_whole
from lwd_jax.plan.count import Operations
from lwd_jax.plan.result import Memory, Result
from lwd_jax.plan.topology import Topology
from lwd_jax.plan.traffic import Traffic

_COMPILERS = ("libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
_VERSIONS = ("jax", "jaxlib", "flax", "optax", *_COMPILERS)
_GIVEN = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # flags of the compilers, beside those of plan.flags


def folder() -> Path:
    """Where results are kept."""
    return cache_folder() / "plan"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _source() -> str:
    """A digest of every file of this package."""
    root, digest = Path(lwd_jax.__file__).parent, hashlib.sha256()
    for file in (file for file in files_in(root) if file.suffix == ".py"):
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def key_of(config: Config, topology: Topology, program: str, arguments: Any) -> str:
    """The name of a result.

    Args:
      arguments: of the program, ShapeDtypeStructs with shardings: what a folder of models or latents brings in.
    """
    shapes = [(x.shape, str(x.dtype), str(x.sharding.spec)) for x in jax.tree.leaves(arguments)]
    parts = [to_json(config), topology.name, topology.slices, program, shapes, _source()]
    parts += [*map(_version, _VERSIONS), *map(os.environ.get, _GIVEN)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read(key: str) -> Result | None:
    """The result of a name; None where there is none, or it is not whole."""
    try:
        values = json.loads((folder() / f"{key}.json").read_text(encoding="utf-8"))
        values["counted"] = Operations(**values["counted"])
        values["memory"] = values["memory"] and Memory(**values["memory"])
        values["traffic"] = tuple(Traffic(**row) for row in values["traffic"])
        return Result(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(key: str, result: Result) -> None:
    """Keeps a result; a cache that cannot be written is done without."""
    values = dataclasses.asdict(result) | {
        "counted": result.counted._asdict(),
        "traffic": [row._asdict() for row in result.traffic],
    }
    try:
        folder().mkdir(parents=True, exist_ok=True)
        write_whole(folder() / f"{key}.json", json.dumps(values).encode())
    except OSError:
        return
