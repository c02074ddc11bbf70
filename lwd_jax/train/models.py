"""The models of a config: random, from a diffusers folder, or from the workdir of an earlier run.

A workdir says of itself, in MODEL_FILE, which model it trains (class and sizes, as diffusers writes them) and, in stage
2, whose latents it trains on; so it can be opened without the folder it was started from.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lwd_jax import config as configs
from lwd_jax.adapters import attach
from lwd_jax.adapters.factors import frozen
from lwd_jax.autoencoders import AUTOENCODERS
from lwd_jax.backbones import BACKBONES
from lwd_jax.errors import UserError, choose, read_json
from lwd_jax.files import in_bucket, locate
from lwd_jax.train.checkpoint import is_workdir, params_fingerprint, read_config, read_params
from lwd_jax.train.state import merge
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.model import Model, abstract_params, find, init_params, load, unread

MODEL_FILE = "model.json"


class Kind(NamedTuple):
    """One of the two models of a run: its field of config.models, table, folder in a pipeline, stage it trains in."""

    field: str
    models: dict[str, Model]
    subfolder: str
    stage: int


AUTOENCODER = Kind("autoencoder", AUTOENCODERS, "vae", 1)
BACKBONE = Kind("backbone", BACKBONES, "transformer", 2)
# Fields of a model's Config that change nothing here.
_INERT = {
    "autoencoder": ("sample_size", "force_upcast"),
    "backbone": ("pos_embed_max_size", "ntk", "proportional_attention"),
}
TRAINED = {kind.stage: kind for kind in (AUTOENCODER, BACKBONE)}
_POSITIONS = ("ntk", "proportional_attention")  # fields of config.models that are FLUX's own

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A model of a run.

    Attributes:
      model: the row of the table.
      module: with config, dtype, param_dtype and remat set.
      params: `params(shardings=None, like=None)` reads them: a function from the abstract tree to layouts, and a tree
        with these parameters in whose dtypes they are read (None = the module's). Those of a run of adapters come with
        the adapters beside the kernels of their base. None = random ones are meant.
      fingerprint: () -> that of their float32 values, which are read once more for it, one at a time on the host; None
        where params is.
      adapters: the config of the adapters among them, the first of a chain of runs first.
    """

    model: Model
    module: nn.Module
    params: Callable | None
    fingerprint: Callable[[], str] | None = None
    adapters: tuple[configs.Adapter, ...] = ()

    def init(self, key: jax.Array) -> Any:
        """Random parameters."""
        return init_params(self.model, self.module.config, key, self.module.param_dtype)

    def init_frozen(self, key: jax.Array) -> Any:
        """Random parameters with the shapes of those that are read, no adapter left to train."""
        params = self.init(key)
        for adapter in self.adapters:
            params = frozen(attach(params, key, adapter))
        return params

    def abstract(self) -> Any:
        """Shapes and dtypes of the parameters, adapters left out."""
        return abstract_params(self.model, self.module.config, self.module.param_dtype)


def seen_from(named: str) -> str:
    """Of a relative path, where it is looked for: a run names its models as it was given them."""
    return "" if in_bucket(named) or os.path.isabs(named) else f" (as seen from {os.getcwd()})"


def _row_of_variant(kind: Kind, variant: str) -> tuple[Model, Any]:
    rows = {name: (model, sizes) for model in kind.models.values() for name, sizes in model.variants.items()}
    return choose(rows, variant, f"{kind.field} variant")


def _check_variant(kind: Kind, path: str, variant: str, model: Model, sizes: Any) -> None:
    expected_model, expected = _row_of_variant(kind, variant)
    if expected_model.class_name != model.class_name:
        raise UserError(f"{path} holds a {model.class_name}, but models.{kind.field}_variant is '{variant}'.")
    differing = (name for name, value in vars(expected).items() if value != getattr(sizes, name))
    if name := next((name for name in differing if name not in _INERT[kind.field]), ""):
        raise UserError(
            f"{path} is not of models.{kind.field}_variant '{variant}': its {name} is {getattr(sizes, name)}, not "
            f"{getattr(expected, name)}."
        )


def describe(kind: Kind, opened: Opened, extra: dict) -> str:
    """The text of MODEL_FILE."""
    foreign = {"_class_name": opened.model.class_name} | opened.model.to_foreign(opened.module.config)
    return json.dumps({"kind": kind.field, "model": foreign, **extra}, indent=2) + "\n"


def read_description(workdir: str | os.PathLike) -> dict:
    """MODEL_FILE of a workdir: {"kind", "model", ..}.

    Raises:
      UserError: it has none.
    """
    file = locate(workdir) / MODEL_FILE
    if not file.is_file():
        raise UserError(f"{workdir} is not the workdir of a run: it has no {MODEL_FILE}.")
    return read_json(file)


def check_same_base(workdir: str | os.PathLike, description: str) -> None:
    """Refuses to continue a run of adapters over another base than the one they were trained over.

    Args:
      workdir: of the run.
      description: the MODEL_FILE that it would have now.

    Raises:
      UserError: with both fingerprints.
    """
    before, now = read_description(workdir), json.loads(description).get("base")
    if now and "base" in before:
        _check_base(workdir, before, now["path"], now["fingerprint"])


def _check_base(workdir: str | os.PathLike, described: dict, path: str, found: str) -> None:
    trained = described["base"]["fingerprint"]
    if trained != found:
        raise UserError(
            f"The adapters of {workdir} were trained over another base: its fingerprint is {trained[:16]}, that of "
            f"{path} is {found[:16]}."
        )


def _from_adapters(kind: Kind, path: str, described: dict, ema: bool, other_base: str, build: dict) -> Opened:
    """The model of a run of adapters: its base, which is checked to be the one they were trained over, and they."""
    config = read_config(path)
    named = other_base or config.models.backbone
    if not locate(named).exists():
        raise UserError(
            f"The base of the adapters of '{path}', '{named}', is not there{seen_from(named)}; name it with --base."
        )
    base = open_model(kind, named, "", ema=config.models.ema, **build)

    def params(shardings=None, like=None):
        _check_base(path, described, named, base.fingerprint())
        return merge(frozen(base.params(shardings, like)), read_params(path, ema, shardings=shardings)[0])

    def both() -> str:
        return hashlib.sha256(f"{base.fingerprint()} {params_fingerprint(path, ema)}".encode()).hexdigest()

    # The sizes are the base's, but the positions are those that the run was trained with.
    module = base.module.clone(config=base.model.from_foreign(described["model"]))
    adapters = (*base.adapters, config.adapter)
    return base._replace(module=module, params=params, fingerprint=both, adapters=adapters)


def _from_workdir(kind: Kind, path: str, ema: bool, other_base: str, build: dict) -> Opened:
    described = read_description(path)
    if described["kind"] != kind.field:
        if kind is AUTOENCODER:  # a stage-2 run: the autoencoder it was trained with, and those weights of it
            models = read_config(path).models
            return open_model(kind, models.autoencoder, "", ema=models.ema, **build)
        raise UserError(f"{path} is the workdir of an {described['kind']}, but a {kind.field} was expected.")
    if "base" in described:
        return _from_adapters(kind, path, described, ema, other_base, build)
    model = choose(kind.models, described["model"]["_class_name"], "model class")
    module = model.build(model.from_foreign(described["model"]), **build)

    def params(shardings=None, like=None):
        # In the dtypes of the model, which are not all param_dtype: the position table stays float32.
        wanted = abstract_params(model, module.config, module.param_dtype) if like is None else like
        return read_params(path, ema, shardings=shardings, like=wanted)[0]

    return Opened(model, module, params, lambda: params_fingerprint(path, ema))


def _from_folder(kind: Kind, path: str, build: dict) -> Opened:
    model, sizes, _ = find(kind.models, path, kind.subfolder)

    def params(shardings=None, like=None):
        return load(kind.models, path, subfolder=kind.subfolder, shardings=shardings, like=like, **build)[1]

    def print_of() -> str:
        return fingerprint(unread(kind.models, path, subfolder=kind.subfolder))

    return Opened(model, model.build(sizes, **build), params, print_of)


def open_model(
    kind: Kind,
    path: str,
    variant: str,
    *,
    ema: bool = True,
    base: str = "",
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: str = "none",
) -> Opened:
    """One model; no parameter is read yet.

    Args:
      kind: AUTOENCODER or BACKBONE.
      path: a diffusers folder (of the model or of a pipeline), a file in FLUX's original layout, a workdir, or "" for
        random parameters of `variant`.
      variant: what a path must hold; "" = anything.
      ema: of a workdir, the averaged parameters.
      base: of a run of adapters, where its base is now; "" = where it was.
      dtype: of matrix products and activations.
      param_dtype: of the parameters.
      remat: the module's remat policy.

    Raises:
      UserError: no such folder or variant, or a model that is not of the variant.
    """
    build = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    if not path:
        model, sizes = _row_of_variant(kind, variant)
        return Opened(model, model.build(sizes, **build), None)
    opened = _from_workdir(kind, path, ema, base, build) if is_workdir(path) else _from_folder(kind, path, build)
    if variant:
        _check_variant(kind, path, variant, opened.model, opened.module.config)
    return opened


def _with_positions(models: configs.Models, opened: Opened) -> Opened:
    """A backbone with the run's NTK and proportional attention, whatever it started with: its workdir says so of itself
    (MODEL_FILE), so that it is sampled with what it was trained with.

    Raises:
      UserError: settings that mean nothing to this backbone.
    """
    sizes, plain = opened.module.config, configs.Models()
    asked = {name: getattr(models, name) for name in _POSITIONS}
    known = {field.name for field in dataclasses.fields(sizes)}
    for name, value in asked.items():
        if name not in known and value != getattr(plain, name):
            raise UserError(
                f"models.{name} is {value}, but a {opened.model.class_name} has no such setting; remove it."
            )
        if name in known and opened.params is not None and value != getattr(sizes, name):
            start = getattr(sizes, name)
            log.warning("This run trains with models.%s %s, but what it starts from has %s.", name, value, start)
    changed = dataclasses.replace(sizes, **{name: value for name, value in asked.items() if name in known})
    return opened._replace(module=opened.module.clone(config=changed))


def open_trained(config: configs.Config) -> Opened:
    """The model that this run trains, with the config's dtypes, remat policy and, in stage 2, positions."""
    kind = TRAINED[config.stage]
    opened = open_model(
        kind,
        getattr(config.models, kind.field),
        getattr(config.models, f"{kind.field}_variant"),
        ema=config.models.ema,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        remat=config.remat,
    )
    return _with_positions(config.models, opened) if kind is BACKBONE else opened


def open_autoencoder(config: configs.Config) -> Opened:
    """The autoencoder of the run, in float32, for decoding and for its scaling."""
    models = config.models
    return open_model(AUTOENCODER, models.autoencoder, models.autoencoder_variant, ema=models.ema)
