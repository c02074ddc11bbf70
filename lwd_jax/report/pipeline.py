"""The models a command was pointed at: a diffusers folder, or the workdir of a run of either stage.

Nothing is read before it is asked for, and nothing is kept: `autoencoder()` and `backbone()` read their weights each
time, so that a command can drop one model before it loads the other.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils.epath import Path

from lwd_jax.backbones import BACKBONES
from lwd_jax.config import Config, Sampling
from lwd_jax.data.text import TextEncoder, kind_of, open_text_encoder
from lwd_jax.errors import UserError, read_json
from lwd_jax.files import locate
from lwd_jax.sample.schedule import TRAIN_TIMES
from lwd_jax.sample.solvers import SCHEDULERS
from lwd_jax.train.checkpoint import is_workdir, read_params
from lwd_jax.train.checkpoint import read_config as read_run
from lwd_jax.train.models import AUTOENCODER, BACKBONE, TRAINED, Kind, open_model, read_description, seen_from
from lwd_jax.train.optimizer import SCHEDULE_FREE
from lwd_jax.train.step import keeps_average
from lwd_jax.weights.folder import is_file, read_config
from lwd_jax.weights.model import find, find_folder

MANIFEST = "lwd.json"  # what `lwd export` writes beside the models
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


class Family(NamedTuple):
    """What the folder of a backbone's pipeline is.

    Attributes:
      pipeline: its class in diffusers.
      text: the row of data.text.TEXT_ENCODERS that its text encoders are.
      parts: the folders of text encoders and tokenizers.
      sampling: Config of the backbone -> what it is sampled with where nothing says.
      solver: the one that the pipeline runs with; "" = any.
    """

    pipeline: str
    text: str
    parts: tuple[str, ...]
    sampling: Callable[[Any], Sampling]
    solver: str = ""


def _distilled(sizes: Any) -> Sampling:
    """FLUX is distilled from guided sampling, schnell into 4 steps as well: no classifier-free guidance."""
    return Sampling(guidance=1.0) if sizes.guidance_embeds else Sampling(guidance=1.0, steps=4)


SD3 = Family("StableDiffusion3Pipeline", "sd3", TEXT_PARTS, lambda sizes: Sampling())
_TWO = tuple(part for part in TEXT_PARTS if not part.endswith("_3"))
FLUX = Family("FluxPipeline", "flux", _TWO, _distilled, solver="euler")
FAMILIES = {"SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}
# The dynamic shift of objective.paths, in diffusers' words, with the defaults of its scheduler.
DYNAMIC_SHIFT = {
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
# Settings of diffusers' flow-matching schedulers that change the noise levels; only these values are reproduced here.
_SCHEDULE = {
    "num_train_timesteps": TRAIN_TIMES,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
}


def _read_scheduler(folder: Path) -> dict:
    """Solver and shift of a diffusers scheduler folder, as fields of Sampling.

    Raises:
      UserError: a scheduler that is none of our solvers, or one with a schedule that is not reproduced here.
    """
    scheduler = read_json(folder / "scheduler_config.json")
    name = scheduler.get("_class_name", "")
    solvers = {foreign: solver for solver, foreign in SCHEDULERS.items()}
    if name not in solvers:
        raise UserError(f"{folder} names the scheduler {name}, but only {' and '.join(solvers)} are supported.")
    for setting, plain in _SCHEDULE.items():
        if scheduler.get(setting, plain) != plain:
            raise UserError(f"{folder} sets {setting} to {scheduler[setting]}, which is not supported.")
    dynamic = scheduler.get("use_dynamic_shifting", False)
    for setting, plain in DYNAMIC_SHIFT.items() if dynamic else ():
        if scheduler.get(setting, plain) != plain:
            raise UserError(f"{folder} sets {setting} to {scheduler[setting]}, which is not supported.")
    shift = scheduler.get("shift", 1.0)  # 1.0 is what diffusers reads where the field is absent
    return {"solver": solvers[name], "shift": float(shift), "shift_rule": "dynamic" if dynamic else "static"}


def _read(
    kind: Kind,
    path: Path,
    ema: bool,
    base: str = "",
    *,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat="none",
    shardings=None,
):
    """(module, params) of a folder or workdir.

    Args:
      kind: AUTOENCODER or BACKBONE.
      path: the folder.
      ema: of a workdir, the averaged parameters.
      base: of a run of adapters, where its base is now; "" = where it was.
      dtype, param_dtype, remat: of the module.
      shardings: a function from the abstract parameters to layouts; None = the default device.
    """
    opened = open_model(kind, str(path), "", ema=ema, base=base, dtype=dtype, param_dtype=param_dtype, remat=remat)
    return opened.module, opened.params(shardings)


@dataclasses.dataclass(frozen=True)
class FolderModels:
    """A diffusers folder: a whole pipeline, or the folder of one model.

    Attributes:
      path: the folder.
      config: None; a folder is no run.
      other_autoencoder: a folder or workdir to take the autoencoder from, "" = its own.
    """

    path: Path
    config: None = None
    other_autoencoder: str = ""

    def autoencoder(self, **options):
        """(module, params); options as of `_read`."""
        if self.other_autoencoder:
            return open_models(self.other_autoencoder).autoencoder(**options)
        return _read(AUTOENCODER, self.path, True, **options)

    def backbone(self, **options):
        """(module, params); options as of `_read`."""
        return _read(BACKBONE, self.path, True, **options)

    def sampling(self) -> Sampling:
        """What to sample with: the run's settings where `lwd export` wrote them, the scheduler's solver and shift."""
        written = self.manifest().get("sampling")
        sampling = Sampling(**written) if written else self._usual_sampling()
        if not (self.path / "scheduler").is_dir():
            return sampling
        return dataclasses.replace(sampling, **_read_scheduler(self.path / "scheduler"))

    def resolution(self) -> int:
        """The side in px of the square pictures the backbone was made for: the run's, where `lwd export` wrote it."""
        written = self.manifest().get("config")
        return written["resolution"] if written else find(BACKBONES, self.path, BACKBONE.subfolder)[1].resolution

    def _usual_sampling(self) -> Sampling:
        if not self.has_backbone():
            return Sampling()
        model, sizes, _ = find(BACKBONES, self.path, BACKBONE.subfolder)
        return FAMILIES[model.class_name].sampling(sizes)

    def has_autoencoder(self) -> bool:
        """Whether the folder has or is one."""
        return self._holds(AUTOENCODER)

    def has_backbone(self) -> bool:
        """Whether the folder has or is one."""
        return self._holds(BACKBONE)

    def _holds(self, kind: Kind) -> bool:
        if is_file(self.path):  # a backbone's, in its original layout
            return kind is BACKBONE
        folder = find_folder(self.path, kind.subfolder)
        return (folder / "config.json").is_file() and read_config(folder).get("_class_name") in kind.models

    def check_plain(self) -> None:
        """Raises UserError: there are no plain weights beside others."""
        raise UserError(
            f"--plain takes the last weights of a run instead of the averaged ones, but '{self.path}' is a diffusers "
            "folder, which has one set of weights."
        )

    def origin(self) -> Path:
        """The folder itself."""
        return self.path

    def describe(self) -> dict:
        """A JSON object that says what was opened."""
        other = {"autoencoder": self.other_autoencoder} if self.other_autoencoder else {}
        return {"path": str(self.path)} | other

    def manifest(self) -> dict:
        """lwd.json of an exported folder, or {}."""
        path = self.path / MANIFEST
        return read_json(path) if path.is_file() else {}

    def text(self) -> dict:
        """What encodes captions: {"kind": a row of data.text.TEXT_ENCODERS, ...}, or {} where nothing is known."""
        if "text" in self.manifest():
            return self.manifest()["text"]
        folder = self.text_folder()
        return {"kind": kind_of(folder)} if folder else {}

    def text_folder(self) -> Path | None:
        """The folder that holds text_encoder/ and its kin, or None."""
        return self.path if (self.path / TEXT_PARTS[0]).is_dir() else None


@dataclasses.dataclass(frozen=True)
class WorkdirModels:
    """The workdir of a run, of either stage.

    Attributes:
      path: the workdir.
      config: of the run.
      ema: whether to take the averaged weights of this workdir; those of earlier ones follow its config.
      other_autoencoder: a folder or workdir to take the autoencoder from, "" = the one the run used.
      other_base: of a run of adapters, the folder or workdir where its base is now, "" = where it was.
    """

    path: Path
    config: Config
    ema: bool = True
    other_autoencoder: str = ""
    other_base: str = ""

    def trained(self):
        """(kind, module, params, step) of what this run trained, in float32; adapters stand beside the kernels."""
        kind = TRAINED[self.config.stage]
        opened = open_model(kind, str(self.path), "", ema=self.ema, base=self.other_base)
        params, _, step = read_params(self.path, self.ema)
        if self.has_adapters():
            params = opened.params()
        return kind, opened.module, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), step

    def has_adapters(self) -> bool:
        """Whether the run trained adapters over a base."""
        return self.config.adapter.kind != "none"

    def autoencoder(self, **options):
        """(module, params): the one this run trained (stage 1) or worked with (stage 2); options as of `_read`."""
        ema, named = self.config.models.ema, self.config.models.autoencoder
        if self.other_autoencoder:
            return open_models(self.other_autoencoder, ema=ema).autoencoder(**options)
        if self.config.stage == 1:
            return _read(AUTOENCODER, self.path, self.ema, **options)
        if not named:
            raise UserError(f"The config of '{self.path}' names no autoencoder; name one with --autoencoder.")
        if not locate(named).is_dir():
            raise UserError(
                f"'{self.path}' used the autoencoder '{named}', which is not there{seen_from(named)}; name it with "
                "--autoencoder."
            )
        return open_models(named, ema=ema).autoencoder(**options)

    def backbone(self, **options):
        """(module, params): the one this run trained; a run of stage 1 has none. Options as of `_read`."""
        self._check_backbone()
        return _read(BACKBONE, self.path, self.ema, self.other_base, **options)

    def check_plain(self) -> None:
        """Raises UserError where there are no plain weights to use."""
        if self.config.optimizer.name == SCHEDULE_FREE:
            raise UserError(
                f"{SCHEDULE_FREE}, which trained '{self.path}', keeps one set of weights to use, its average."
            )

    def _check_backbone(self) -> None:
        if self.config.stage == 1:
            raise UserError(f"The run in '{self.path}' is of stage 1: it has an autoencoder, but no backbone.")

    def describe(self) -> dict:
        """A JSON object that says what was opened."""
        averaged = keeps_average(self.config) and (self.ema or self.config.optimizer.name == SCHEDULE_FREE)
        return {"path": str(self.path), "name": self.config.name, "weights": "ema" if averaged else "plain"}

    def sampling(self) -> Sampling:
        """The settings to sample with; a run of stage 1 has none."""
        self._check_backbone()
        return self.config.sampling

    def resolution(self) -> int:
        """The side in px of the square pictures of the run."""
        return self.config.resolution

    def text(self) -> dict:
        """What encoded the captions that the run was trained on; as FolderModels.text."""
        described = read_description(self.path)
        if "text" in described:
            return described["text"]
        base = self.base()
        return base.text() if base else {}

    def base(self):
        """The models that the run started from, or None where it started from random weights or they are gone."""
        named = self.config.models.backbone if self.config.stage == 2 else self.config.models.autoencoder
        source = self.other_base or named
        return open_models(source) if source and locate(source).is_dir() else None

    def origin(self) -> Path | None:
        """The diffusers folder at the beginning of the chain of runs, or None."""
        base = self.base()
        return base.origin() if base else None

    def text_folder(self) -> Path | None:
        """The folder with the text encoders of the models that the run started from, or None."""
        base = self.base()
        return base.text_folder() if base else None


def open_models(
    path: str | os.PathLike, *, ema: bool = True, autoencoder: str = "", base: str = ""
) -> FolderModels | WorkdirModels:
    """The models of a diffusers folder or of a workdir; nothing is read yet.

    Args:
      path: a folder with model_index.json, the folder of one model, an export of stage 1 (a folder with vae/), a
        backbone's file in its original layout, or a workdir with config.json and checkpoints/.
      ema: of a workdir, the averaged weights.
      autoencoder: another folder or workdir to take the autoencoder from; "" = the folder's own, or the one that the
        run used.
      base: of a run of adapters, the folder or workdir where its base is now; "" = where it was.

    Raises:
      UserError: there is no such folder, or it is neither; or a base for what is no run of adapters.
    """
    path = locate(path)
    if is_file(path):
        return FolderModels(path, other_autoencoder=autoencoder)
    if not path.is_dir():
        raise UserError(f"There is no folder '{path}'.")
    if is_workdir(path):
        run = WorkdirModels(path, read_run(path), ema, autoencoder, base)
        if base and not run.has_adapters():
            raise UserError(f"'{path}' trained no adapters: it needs no base.")
        return run
    if base:
        raise UserError(f"'{path}' is no run of adapters: it needs no base.")
    models = FolderModels(path, other_autoencoder=autoencoder)
    if any((path / name).is_file() for name in ("model_index.json", "config.json")) or models.has_autoencoder():
        return models
    raise UserError(f"'{path}' holds no models: it is neither a diffusers folder nor a workdir.")


def text_encoder(models: FolderModels | WorkdirModels, folder: str | os.PathLike = "") -> TextEncoder:
    """The text encoder that belongs to the models.

    Args:
      models: of `open_models`.
      folder: a diffusers folder with text encoders; "" = the one the models came with.

    Raises:
      UserError: none is known, it cannot be read, or it is not the one that the training captions were encoded with.
    """
    text = models.text() or ({"kind": kind_of(locate(folder))} if folder else {})
    if not text:
        raise UserError(f"'{models.path}' comes with no text encoder; name a folder that has them with --text-models.")
    encoder = open_text_encoder(text, locate(folder) if folder else models.text_folder())
    trained_with = text.get("fingerprint", encoder.fingerprint)
    if trained_with != encoder.fingerprint:
        raise UserError(
            f"'{models.path}' was trained on captions of another text encoder: its fingerprint is {trained_with[:16]}, "
            f"that of the one given {encoder.fingerprint[:16]}."
        )
    return encoder
