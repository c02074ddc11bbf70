"""The denoising transformers: one file each, one line each in the table."""

from lwd_jax.backbones import flux, sd3
from lwd_jax.weights.model import Model, load, save
from lwd_jax.weights.table import Row

BACKBONES = {model.class_name: model for model in (sd3.BACKBONE, flux.BACKBONE)}


def load_backbone(folder, **kinds):
    """(module, params) of a diffusers folder, or of `transformer/` in a pipeline folder.

    Args:
      folder: with config.json and safetensors.
      kinds: dtype, param_dtype, remat, shardings; see `weights.model.load`.

    Raises:
      UserError: no such folder, a checkpoint of another model, weights that do not fit.
    """
    return load(BACKBONES, folder, subfolder="transformer", **kinds)


def _row(module) -> Model:
    return next(model for model in BACKBONES.values() if isinstance(module, model.build))


def weights_of(module) -> list[Row]:
    """The weights table of a backbone."""
    return _row(module).rows(module.config)


def class_of(module) -> str:
    """diffusers' name of a backbone module's class."""
    return _row(module).class_name


def extend_backbone(module, params, resolution: int):
    """(module, params) that diffusers can run on pictures of `resolution` px too, once saved; see `Model.extended`."""
    config, params = _row(module).extended(module.config, params, resolution)
    return module.clone(config=config), params


def save_backbone(folder, module, params, **kinds) -> None:
    """Writes a diffusers folder that `load_backbone` and diffusers' from_pretrained read.

    Args:
      folder: to be made.
      kinds: dtype, max_shard_bytes; see `weights.model.save`.
    """
    save(_row(module), folder, module, params, **kinds)
