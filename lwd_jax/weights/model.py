"""What a model's file ends in, and how any such model is built, read and saved."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils.epath import Path
from flax import linen as nn

from lwd_jax.errors import UserError, did_you_mean
from lwd_jax.files import on_disk
from lwd_jax.weights.draws import draws
from lwd_jax.weights.folder import Tensors, is_file, read_config, write_folder
from lwd_jax.weights.table import flat, nested, read, unread_params, write

_INIT_RESOLUTION = 64  # px; parameter shapes do not depend on it


class Model(NamedTuple):
    """One model family: `backbones.sd3.BACKBONE`, `autoencoders.kl.AUTOENCODER`.

    Attributes:
      class_name: diffusers' name of it, "_class_name" in config.json.
      variants: name -> Config, the rows of sizes.
      build: (config, dtype=float32, param_dtype=float32, remat="none") -> Linen module.
      rows: config -> the weights table, a list of Row.
      from_foreign: diffusers config dict -> Config; UserError on anything that is not supported.
      to_foreign: Config -> the full diffusers config dict.
      inputs: (config, resolution in px, batch) -> the arguments of the module, as ShapeDtypeStructs.
      extended: (config, params, resolution in px) -> (config, params) of the model that diffusers can run at that
        resolution too, with the output it has here.
      original: the tensors of a file -> (config, the same tensors under diffusers' names) if it is this model in the
        layout it was first published in, else None.
    """

    class_name: str
    variants: dict[str, Any]
    build: Callable
    rows: Callable
    from_foreign: Callable
    to_foreign: Callable
    inputs: Callable
    extended: Callable = lambda config, params, resolution: (config, params)
    original: Callable = lambda tensors: None


def filled(foreign: Mapping[str, Any], defaults: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """The fields of a diffusers config.json with diffusers' own defaults for those that it does not say.

    Raises:
      UserError: a field that the class does not have; names that begin with _ are none.
    """
    known = {name: value for name, value in foreign.items() if not name.startswith("_")}
    for name in known:
        if name not in defaults:
            raise UserError(f"{class_name} has no config field '{name}'.{did_you_mean(name, defaults)}")
    return dict(defaults) | known


@functools.lru_cache(maxsize=64)  # commands ask several times, and tracing a model takes a second
def _initialiser(build: Callable, inputs: Callable, config, param_dtype) -> Callable:
    module, inputs = build(config, param_dtype=param_dtype), inputs(config, _INIT_RESOLUTION, 1)

    @jax.jit
    def init(key):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        return module.init(draws(key), *zeros)["params"]

    return init


def abstract_params(model: Model, config, param_dtype=jnp.float32):
    """The parameter tree as ShapeDtypeStructs; nothing is allocated."""
    return jax.eval_shape(_initialiser(model.build, model.inputs, config, param_dtype), jax.random.key(0))


def init_params(model: Model, config, key: jax.Array, dtype=jnp.float32, *, shardings=None):
    """Random parameters of the given dtype, made where `shardings` (a tree; None = the default device) puts them."""
    return jax.jit(_initialiser(model.build, model.inputs, config, dtype), out_shardings=shardings)(key)


def find_folder(folder: str | os.PathLike, subfolder: str) -> Path:
    """The model's own folder: `folder`, or its `subfolder` where that is a whole pipeline's (has a model_index.json) or
    one part of a pipeline (has the subfolder, and no config of its own).
    """
    folder = on_disk(folder, "A diffusers folder")
    part = not (folder / "config.json").is_file() and (folder / subfolder / "config.json").is_file()
    return folder / subfolder if part or (folder / "model_index.json").is_file() else folder


def find(models: Mapping[str, Model], folder: str | os.PathLike, subfolder: str) -> tuple[Model, Any, Callable]:
    """Which model a folder holds, or a file in the layout that a model was first published in.

    Args:
      models: class name -> Model, those that may be there.
      folder: of the model, or of a pipeline that has it in `subfolder`; or a safetensors file.

    Returns:
      (model, config, () -> its tensors under diffusers' names). No tensor is read yet.

    Raises:
      UserError: no such folder, or it holds another model.
    """
    folder = find_folder(folder, subfolder)
    if is_file(folder):
        tensors = Tensors(folder)
        for model in models.values():
            if found := model.original(tensors):
                return model, found[0], lambda: found[1]
        raise UserError(f"{folder} is no {' or '.join(models)} in a layout that is read from a single file.")
    foreign = read_config(folder)
    name = foreign.get("_class_name")
    if name not in models:
        raise UserError(f"{folder} holds a model of class {name}, but {' or '.join(models)} was expected.")
    return models[name], models[name].from_foreign(foreign), lambda: Tensors(folder)


def unread(models: Mapping[str, Model], folder: str | os.PathLike, *, subfolder: str = "") -> Any:
    """The parameters of a diffusers folder as leaves that np.asarray reads, one at a time, in float32.

    Raises:
      UserError: see `load`.
    """
    model, config, tensors = find(models, folder, subfolder)
    return unread_params(model.rows(config), tensors(), abstract_params(model, config))


def load(
    models: Mapping[str, Model],
    folder: str | os.PathLike,
    *,
    subfolder: str = "",
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: str = "none",
    shardings=None,
    like=None,
) -> tuple[nn.Module, Any]:
    """Reads a diffusers folder, or a file in a model's original layout, parameter by parameter.

    Args:
      models: class name -> Model, those that may be there.
      folder: see `find`.
      dtype: of matrix products and activations.
      param_dtype: of the parameters.
      remat: the module's remat policy.
      shardings: a tree like the parameters, or a function from the abstract parameters to one; None = default device.
      like: a tree with these parameters (and others perhaps), in whose dtypes they are read; None = param_dtype.

    Returns:
      (module, params).

    Raises:
      UserError: no such folder, a pickle, a checkpoint of another model, or one that the table does not cover exactly.
    """
    model, config, tensors = find(models, folder, subfolder)
    module = model.build(config, dtype=dtype, param_dtype=param_dtype, remat=remat)
    abstract = abstract_params(model, config, param_dtype)
    if like is not None:
        kinds = flat(like)
        abstract = nested(
            {path: jax.ShapeDtypeStruct(leaf.shape, kinds[path].dtype) for path, leaf in flat(abstract).items()}
        )
    places = shardings(abstract) if callable(shardings) else shardings
    try:
        return module, read(model.rows(config), tensors(), abstract, shardings=places)
    except UserError as error:
        raise UserError(f"{find_folder(folder, subfolder)}: {error}") from error


def save(model: Model, folder: str | os.PathLike, module: nn.Module, params, **kinds) -> None:
    """Writes a diffusers folder that `load` and diffusers' from_pretrained read.

    Args:
      model: the row of the table.
      folder: new or empty.
      module: with config set.
      params: its parameters.
      kinds: dtype and max_shard_bytes of the files; see `write_folder`.
    """
    foreign = {"_class_name": model.class_name} | model.to_foreign(module.config)
    write_folder(folder, foreign, write(model.rows(module.config), params), **kinds)
