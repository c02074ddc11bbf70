"""`--models` with `--plain` and `--autoencoder`, shared by the commands that open models."""

from lwd_jax.report.pipeline import FolderModels, WorkdirModels, open_models


def open_given(
    models: str, *, plain: bool = False, autoencoder: str = "", base: str = ""
) -> FolderModels | WorkdirModels:
    """The models that a command was given; nothing is read yet.

    Args:
      models: a diffusers folder or a workdir.
      plain: of a workdir, the last weights, not the averaged ones.
      autoencoder: a folder or workdir to take the autoencoder from; "" = from `models`.
      base: of a run of adapters, where its base is now; "" = where it was.

    Raises:
      UserError: there is no such folder, or it is neither; or `plain` of what has one set of weights.
    """
    if autoencoder:
        open_models(autoencoder)  # a folder that is not there is named now, not when it is needed
    opened = open_models(models, ema=not plain, autoencoder=autoencoder, base=base)
    if plain:
        opened.check_plain()
    return opened
