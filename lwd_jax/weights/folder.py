"""Diffusers model folders: config.json and safetensors, in one file or in shards with an index.

Tensors are read one at a time and only when asked for. Pickles are never opened. A tensor's name is data, never a path.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils.epath import Path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lwd_jax.errors import UserError, no_duplicates, read_json
from lwd_jax.files import is_empty, on_disk
from lwd_jax.weights.table import flat

STEM = "diffusion_pytorch_model"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack")


class Stored(NamedTuple):
    """A tensor on disk. `np.asarray(stored)` reads it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | str  # a safetensors code, where it is not a floating-point type that weights may have

    def __array__(self, dtype=None, copy=None):
        # The file is opened for this one tensor, so that no memory map outlives the read.
        with safe_open(self.path, framework="np") as file:
            tensor = file.get_tensor(self.name)
        return tensor if dtype is None else tensor.astype(dtype)


def header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. The library checks it, but accepts a name given twice; this does not."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a safetensors file.")
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:
            text = file.read(int.from_bytes(file.read(8), "little"))
        entries = json.loads(text, object_pairs_hook=no_duplicates)
    except (SafetensorError, UserError, OSError) as error:
        raise UserError(f"{path} is not a sound safetensors file: {error}.") from error
    return {
        name: Stored(path, name, tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def read_config(folder: str | os.PathLike) -> dict:
    """config.json of a diffusers model folder.

    Raises:
      UserError: the folder or the file is missing, or is not JSON.
    """
    folder = on_disk(folder, "A diffusers folder")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a diffusers model folder: it has no config.json.")
    return read_json(folder / "config.json")


def is_file(path: Path) -> bool:
    """Whether it is a safetensors file by itself."""
    return path.suffix == ".safetensors" and path.is_file()


def _weights_file(folder: Path) -> Path:
    """The safetensors file or index of a folder: the plain one, or the only variant (such as .fp16)."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    names = (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json")
    plain = [folder / name for name in names if (folder / name).exists()]
    patterns = (f"{STEM}.*.safetensors", f"{STEM}.safetensors.index.*.json")
    variants = [path for path in folder.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in patterns)]
    found = plain or sorted(variants)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder} holds more than one set of weights: {', '.join(path.name for path in found)}.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UserError(f"{folder} holds a pickle ({pickles[0]}), which can run code: convert it to safetensors.")
    raise UserError(f"{folder} holds no weights: there is no {STEM}.safetensors.")


def _sharded(index: Path) -> dict[str, Stored]:
    """The tensors of the shards that an index names; index and shards must agree exactly."""
    place = read_json(index).get("weight_map")
    if not isinstance(place, dict):
        raise UserError(f"{index} has no weight_map.")
    tensors: dict[str, Stored] = {}
    shards = sorted(set(place.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index} names '{shard}', which is not a safetensors file of its own folder.")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index} names the shard {shard}, which is missing.")
    for shard in shards:
        stored = header(index.parent / shard)
        expected = {name for name, file in place.items() if file == shard}
        wrong = sorted(expected ^ set(stored))
        if wrong:
            raise UserError(f"{index} and its shard {shard} disagree about '{wrong[0]}' ({len(wrong)} in all).")
        tensors |= stored
    return tensors


class Tensors(Mapping):
    """The tensors of a diffusers model folder, or of one file: name -> Stored, nothing read but the headers."""

    def __init__(self, folder: str | os.PathLike):
        path = on_disk(folder, "A diffusers folder")
        path = path if is_file(path) else _weights_file(path)
        self._stored = header(path) if path.suffix == ".safetensors" else _sharded(path)

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _shards(tensors: Iterable[tuple[str, np.ndarray]], limit: float, dtype) -> Iterator[dict[str, np.ndarray]]:
    """Groups of tensors of at most `limit` bytes (one tensor may be larger)."""
    group: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        tensor = np.asarray(tensor, dtype=dtype, order="C")
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def _write_weights(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], limit: float, dtype) -> None:
    files: list[tuple[Path, dict[str, int]]] = []
    for number, group in enumerate(_shards(tensors, limit, dtype)):
        path = folder / f"{number}.partial"
        try:
            save_file(group, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"Weights cannot be written to {folder} ({error}).") from error
        files.append((path, {name: tensor.nbytes for name, tensor in group.items()}))
    if len(files) == 1:
        files[0][0].rename(folder / f"{STEM}.safetensors")
        return
    place = {}
    for number, (path, sizes) in enumerate(files, start=1):
        name = f"{STEM}-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / name)
        place |= dict.fromkeys(sizes, name)
    index = {"metadata": {"total_size": sum(sum(sizes.values()) for _, sizes in files)}, "weight_map": place}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_folder(
    folder: str | os.PathLike,
    config: dict,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: float = 5e9,
    dtype=None,
) -> None:
    """Writes a diffusers model folder: whole or not at all (a sibling folder is written, then renamed).

    Args:
      folder: must not exist, or be empty.
      config: the content of config.json, `_class_name` included.
      tensors: (name, array) pairs; one shard of them is in memory at a time.
      max_shard_bytes: beyond it the weights go to several files with an index.
      dtype: float32, float16 or bfloat16 of the file; None = as the tensors are.

    Raises:
      UserError: the folder is there and not empty.
    """
    folder = on_disk(folder, "A diffusers folder").absolute()
    if folder.exists() and (not folder.is_dir() or not is_empty(folder)):
        raise UserError(f"{folder} exists already; name a new folder.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, tensors, max_shard_bytes, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        partial.rmtree(missing_ok=True)


def fingerprint(params) -> str:
    """SHA-256 (hex) of names, shapes and float32 values of a parameter tree; files, shards and dtypes do not matter."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flat(params).items()):
        digest.update(f"{path} {tuple(leaf.shape)}\n".encode())
        digest.update(np.asarray(leaf, dtype=np.float32, order="C").data)
    return digest.hexdigest()
